"""The command `knockout`: which layers and parts, and which questions it asks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmgraft.analysis.layer_knockout import MODES, PARTS
from vlmgraft.lab.exam import draw_exam, save_questions
from vlmgraft.storage.jsonl import read_rows, write_rows


def test_knockout_of_one_layer(vlmgraft: Run, trio: Path, tmp_path: Path) -> None:
    asked = ("knockout", trio / "vlm", "--samples", "8", "--layers", "3", "--part", "mlp", "--mode", "zero", "--quiet")
    ran = vlmgraft(*asked, "--out", tmp_path / "k", "--json")
    rows = json.loads(ran.out)["rows"]
    assert ran.code == 0 and [row["mode"] for row in rows] == ["intact", "zero"]
    assert rows == list(read_rows(tmp_path / "k" / "knockout.jsonl"))
    assert vlmgraft(*asked, "--out", tmp_path / "k").code == 2
    ran = vlmgraft(*asked, "--out", tmp_path / "k", "--resume")
    assert ran.code == 0 and "mlp, layer 3" in ran.out


def test_a_question_file_is_asked_by_category(vlmgraft: Run, trio: Path, tmp_path: Path) -> None:
    exam = draw_exam(0, "validation", {"sum": 3, "colour": 3})
    save_questions(exam.questions, tmp_path / "q.jsonl")
    rows = list(read_rows(tmp_path / "q.jsonl"))
    for row, item, question in zip(rows, exam.items, exam.questions, strict=True):
        row |= {"category": item.task, "answer": question.answer}
    write_rows(tmp_path / "q.jsonl", rows)
    asked = ("knockout", trio / "vlm", "--data", tmp_path / "q.jsonl", "--mode", "mean", "--part", "mlp")
    asked = (*asked, "--layers", "0", "--max-new-tokens", "28", "--quiet", "--json", "--out", tmp_path / "k")
    assert "both are needed" in vlmgraft(*asked).err
    found = json.loads(vlmgraft(*asked, "--reasoning", "sum").out)["rows"]
    assert set(found[0]["tasks"]) == {"reasoning: sum", "perception: colour"}
    assert found[0]["tasks"]["perception: colour"] == 1
    write_rows(tmp_path / "q.jsonl", [{**row, "image": "gone.png"} for row in rows])
    ran = vlmgraft(*asked, "--reasoning", "sum", "--out", tmp_path / "other")
    assert ran.code == 2 and "gone.png" in ran.err


def test_rows_say_their_kind_and_may_come_from_several_files(vlmgraft: Run, trio: Path, tmp_path: Path) -> None:
    for task, kind in (("sum", "reasoning"), ("colour", "perception")):
        exam = draw_exam(0, "validation", {task: 2})  # type: ignore[dict-item]
        save_questions(exam.questions, tmp_path / f"{task}.jsonl")
        rows = list(read_rows(tmp_path / f"{task}.jsonl"))
        answered = [{**row, "kind": kind, "answer": q.answer} for row, q in zip(rows, exam.questions, strict=True)]
        write_rows(tmp_path / f"{task}.jsonl", answered)
    files = ("--data", tmp_path / "sum.jsonl", "--data", tmp_path / "colour.jsonl", "--max-new-tokens", "28")
    asked = ("knockout", trio / "vlm", *files, "--mode", "zero", "--part", "mlp", "--layers", "0", "--quiet", "--json")
    found = json.loads(vlmgraft(*asked, "--out", tmp_path / "k").out)["rows"]
    assert set(found[0]["tasks"]) == {"reasoning: sum", "perception: colour"}
    assert found[0]["tasks"]["perception: colour"] == 1


Run = Callable[..., Any]


def test_options_reach_the_knocking_out(vlmgraft: Run, stand_in: Run) -> None:
    asked = stand_in("vlmgraft.analysis.layer_knockout", "knockout", [])
    words = ("knockout", "merged", "-o", "out", "-q", "--json", "--vlm", "v", "--layers", "0-2", "--part", "mlp")
    assert vlmgraft(*words, "--mode", "mean", "--mode", "only", "--alone", "--resume").code == 0
    ((model, out, data), options) = asked[0]
    assert (model, out, data.data) == ("merged", Path("out"), ("lab",))
    assert options == {
        "parts": ["mlp"], "modes": ["mean", "only"], "vlm": "v", "alone": True, "layers": "0-2", "resume": True,
        "progress": None,
    }  # fmt: skip
    assert vlmgraft("knockout", "merged", "-o", "out", "-q").code == 0
    assert (asked[1][1]["parts"], asked[1][1]["modes"]) == (PARTS, MODES), "all of them by default"
