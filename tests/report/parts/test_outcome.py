"""A receipt in words, answers side by side with their images, recipes to copy."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmgraft.errors import DataError
from vlmgraft.report.collect import Document, Run
from vlmgraft.report.page import write_report
from vlmgraft.report.parts import outcome
from vlmgraft.report.parts.outcome import answers, receipt, recipes


def tensor(name: str, verdict: str, added: float = 0.0, norm: float | None = None) -> dict[str, Any]:
    return {"name": name, "verdict": verdict, "reason": "r", "added": added, "task_vector": norm}


def test_a_receipt_is_told_in_norms_of_all_tensors_together() -> None:
    """Added 3 and 4, of task vectors 6 and 8: 5 of 10; per matrix a half each."""
    tensors = [
        tensor("model.layers.0.mlp.up_proj.weight", "merged", 3.0, 6.0),
        tensor("model.layers.2.self_attn.q_proj.weight", "merged", 4.0, 8.0),
        tensor("visual.x", "kept"),
        tensor("norm.weight", "excluded"),
    ]
    facts = {"method": "ties", "seconds": 61.25, "peak_memory": 2 * 10**9, "versions": {"torch": "2.9"}}
    section = receipt(Document(Path("run"), {**facts, "tensors": tensors, "notes": ["told once"]}))
    assert section.title == "The merge changed 2 of 4 tensors and took 50 % of the task vector's length"
    assert "Method ties: 2 of 4 tensors merged, 1 left out by the recipe, 1 kept" in section.text[0]
    assert "2.0 GB at most. torch 2.9." in section.text[0] and section.text[1] == "told once"
    chart = section.figures[0].chart
    assert (chart.rows, chart.columns) == (["up_proj", "q_proj"], ["0", "2"])
    assert chart.values == [[0.5, None], [None, 0.5]]


def test_a_method_without_a_base_has_no_share() -> None:
    """Linear knows no task vector."""
    facts = {"method": "linear", "seconds": 1.0, "peak_memory": 0, "versions": {}}
    section = receipt(Document(Path("run"), {**facts, "tensors": [tensor("layers.0.a.weight", "merged", 1.0)]}))
    assert section.title == "The merge changed 1 of 1 tensors" and not section.figures


def asked(image: str | None, kind: str = "reasoning") -> dict[str, Any]:
    said = [{"model": "VLM", "said": "3 < 4", "right": False}, {"model": "merged", "said": "12", "right": True}]
    return {"task": "sum", "kind": kind, "question": "what <is> it?", "expected": "12", "image": image, "answers": said}


def test_answers_are_counted_and_shown_with_their_images(tmp_path: Path) -> None:
    """A small image stays as it is; a large one is made smaller; one that is gone is left out."""
    Image.new("RGB", (20, 10), (200, 30, 40)).save(tmp_path / "small.png")
    Image.new("RGB", (800, 400), (200, 30, 40)).save(tmp_path / "large.png")
    section = answers(Run(tmp_path, [asked("small.png"), asked("large.png", "perception"), asked("gone.png")]))
    assert section.title == "3 questions answered side by side: VLM 0 right, merged 3 right"
    images = [part.split('"')[0] for part in section.extra.split('src="')[1:]]
    assert [image.split(";")[0] for image in images] == ["data:image/png", "data:image/jpeg"]
    opened = [Image.open(io.BytesIO(base64.b64decode(image.split(",")[1]))) for image in images]
    assert [one.size for one in opened] == [(20, 10), (384, 192)]
    assert opened[0].getpixel((0, 0)) == (200, 30, 40)
    assert section.extra.count('<dd class="wrong">3 &lt; 4</dd>') == 3 and "<is>" not in section.extra
    assert list(section.filters[0].values) == ["reasoning", "perception"]


def test_images_beyond_the_budget_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(outcome, "IMAGE_BYTES", 10)
    section = answers(Run(tmp_path, [asked("a.png")]))
    assert "<img" not in section.extra and "Some images were left out" in section.text[0]
    assert not section.filters, "one kind needs no filter"


def test_recipes_are_shown_as_they_are_written() -> None:
    assert recipes([]) == []
    (one,) = recipes([Document(Path("a/first"), "vlm: a\n# 1 < 2\n")])
    assert one.title == "This recipe replays the merge" and "first/recipe.yaml" in one.extra
    assert "vlm: a\n# 1 &lt; 2</pre>" in one.extra
    (two,) = recipes([Document(Path("first"), "vlm: a"), Document(Path("second"), "vlm: b")])
    assert two.title == "These recipes replay the merges" and "data-copy='recipe-1'" in two.extra


def test_a_picture_that_is_none_is_named(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "answers", tmp_path / "answers")
    (tmp_path / "answers" / "0.png").write_text("no picture")
    with pytest.raises(DataError, match=r"answers/0\.png: cannot be read, or is corrupt"):
        write_report([tmp_path], tmp_path / "r.html")
