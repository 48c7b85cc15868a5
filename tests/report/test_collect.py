"""What is found in run folders, by the names of its files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import estimate
from safetensors.numpy import save_file

from vlmgraft.errors import CheckpointError, InputError, OutputError
from vlmgraft.evaluation.items import Item, Kind
from vlmgraft.evaluation.records import record_of
from vlmgraft.report import page as page_module
from vlmgraft.report.collect import collect
from vlmgraft.report.page import write_report
from vlmgraft.storage.jsonl import write_json, write_rows


def evaluation(folder: Path, model: str, right: int) -> None:
    folder.mkdir(parents=True)
    averages = {kind: estimate(right / 4) for kind in ("reasoning", "perception")}
    write_json(folder / "summary.json", {"averages": averages})
    write_json(folder / "run.json", {"model": f"/models/{model}"})
    kinds: tuple[tuple[str, Kind], ...] = (("sums", "reasoning"), ("looks", "perception"))
    items = [
        Item(f"{task}/{place}", f"{task}?", answers=("4", "four"), task=task, kind=kind)
        for task, kind in kinds
        for place in range(4)
    ]
    said = [record_of(item, item.question, "said", tokens=1, prompt_tokens=1, cut=False) for item in items]
    scores = [float(place < right) for _ in kinds for place in range(4)]
    write_rows(
        folder / "records.jsonl", [replace(record, score=score) for record, score in zip(said, scores, strict=True)]
    )


def test_evaluations_are_compared(tmp_path: Path) -> None:
    evaluation(tmp_path / "a", "base", 1)
    evaluation(tmp_path / "b", "merged", 3)
    write_json(tmp_path / "summary.json", ["not an evaluation"])
    found = collect([tmp_path])
    assert [(row["method"], row["reasoning"]["mean"]) for row in found.points[0].rows] == [
        ("base", 0.25),
        ("merged", 0.75),
    ]
    answers = found.answers[0].rows
    assert [row["task"] for row in answers[:4]] == ["sums", "looks", "sums", "looks"] and len(answers) == 8
    assert [one["right"] for one in answers[2]["answers"]] == [False, True] and answers[0]["expected"] == "4, four"
    text = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert "8 questions answered side by side: base 2 right, merged 6 right" in text


def test_what_cannot_be_reported_is_said(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such folder"):
        collect([tmp_path / "gone"])
    with pytest.raises(InputError, match="holds none of the files"):
        collect([tmp_path])
    copy = shutil.copytree(runs / "work" / "gates", tmp_path / "gates")
    (copy / "gates.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="not of a complete gates folder"):
        collect([tmp_path])
    monkeypatch.setattr(page_module, "MAX_BYTES", 1000)
    with pytest.raises(OutputError, match="fewer folders"):
        write_report([runs / "sweep"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_only_receipts_of_merges_are_shown(tmp_path: Path, runs: Path) -> None:
    """Stores of factors, adapters and tuned folders have receipts of another kind."""
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs" / "factors").mkdir()
    write_json(tmp_path / "runs" / "factors" / "receipt.json", {"tensors": [{"name": "U"}], "files": [], "digest": ""})
    assert len(collect([tmp_path / "runs"]).receipts) == len(collect([runs]).receipts) == 1
    write_report([tmp_path / "runs" / "factors", tmp_path / "runs" / "merged"], tmp_path / "page.html")


@pytest.mark.parametrize(
    ("shape", "fill", "dtype"),
    [((3,), np.nan, np.float32), ((), 0, np.float32), ((0,), 0, np.float32), ((3,), 0, np.float64), ((3,), 0, bool)],
)
def test_gates_that_are_none_are_refused(shape: Any, fill: float, dtype: Any, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "work" / "gates", tmp_path / "gates")
    save_file({"a": np.full(shape, fill, dtype)}, tmp_path / "gates" / "gates.safetensors")
    with pytest.raises(CheckpointError, match=r"gates\.safetensors: a is .*; learn the gates again"):
        collect([tmp_path])
