"""`kl_divergence`: of a finished folder, on prompts of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

import vlmgraft as vg
from experiments.lab.tasks import draw_item
from vlmgraft.data.traces import load_traces
from vlmgraft.distillation.teacher import build_targets
from vlmgraft.errors import DataError
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.lab.exam import draw_exam, save_questions, save_traces


def test_divergence_is_the_kl_from_the_vlm(trio: Path, tmp_path: Path) -> None:
    """Zero for the VLM itself; for a merged folder what the targets say in memory; more for a stronger merge."""
    exam = draw_exam(0, "calibration", {"colour": 4, "read": 4})
    file = save_questions(exam, tmp_path / "questions.jsonl")
    recipe = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    found = []
    for scale in (0.5, 1.0):
        method = {"name": "task_arithmetic", "scale": scale}
        vg.merge({**recipe, "method": method}, tmp_path / f"merged-{scale}")
        found.append(vg.analysis.kl_divergence(tmp_path / f"merged-{scale}", trio / "vlm", file, max_new_tokens=12))
    own = (load_vlm(trio / "vlm", "float32"), load_processor(trio / "vlm"))
    targets = build_targets(own, own, exam.questions, max_new_tokens=12, batch_size=16)
    assert found[1] == pytest.approx(
        targets.mean_kl(load_vlm(tmp_path / "merged-1.0", "float32"), replayed=False), rel=1e-3
    )
    assert 0 < found[0] < found[1]
    assert vg.analysis.kl_divergence(trio / "vlm", trio / "vlm", file, max_new_tokens=12) == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError):
        vg.analysis.kl_divergence(trio / "vlm", trio / "vlm", [])


def test_the_labs_files_are_read_again(tmp_path: Path) -> None:
    """Traces with their chain of thought; a finished file is left alone."""
    exam = draw_exam(0, "train", {"sum": 2, "fact": 1}, draw=draw_item)
    traces = load_traces(save_traces(exam, tmp_path / "t.jsonl")).traces
    assert [trace.answer for trace in traces] == [item.answer for item in exam.items]
    assert [len(trace.images) for trace in traces] == [1, 1, 0]
    before = (tmp_path / "t.jsonl").read_text()
    save_traces(draw_exam(1, "train", {"sum": 1}), tmp_path / "t.jsonl")
    assert (tmp_path / "t.jsonl").read_text() == before


def test_tables_and_records_in_notebooks(trio: Path, tmp_path: Path) -> None:
    suite = draw_exam(0, "test", {"sum": 2, "colour": 2}).suite
    summary = vg.evaluate(trio / "vlm", suite, tmp_path / "s")
    assert "| sum | reasoning |" in summary._repr_markdown_()
    assert [record.id for record in vg.load_records(tmp_path / "s")] == [item.id for item in suite.items]
    assert "| sum |" in vg.compare(tmp_path / "s", tmp_path / "s")._repr_markdown_()
    with pytest.raises(DataError, match="no such file"):
        vg.load_records(tmp_path)
