"""The commands on the lab, end to end and small: rows, tables, JSON, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from vlmgraft.data import questions
from vlmgraft.lab.exam import draw_exam, save_questions
from vlmgraft.storage.jsonl import read_rows, write_rows

Run = Callable[..., Any]


@pytest.fixture
def recipe(trio: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(file: str, **method: Any) -> Path:
        places = {"vlm": "vlm", "donor": "donor", "donor_base": "base"}
        path = tmp_path / f"{file}.yaml"
        path.write_text(yaml.safe_dump({**{key: str(trio / one) for key, one in places.items()}, "method": method}))
        return path

    return write


def test_knockout_of_one_layer(vlmgraft: Run, trio: Path, tmp_path: Path) -> None:
    asked = ("knockout", trio / "vlm", "--samples", "8", "--layers", "3", "--part", "mlp", "--mode", "zero", "--quiet")
    ran = vlmgraft(*asked, "--out", tmp_path / "k", "--json")
    rows = json.loads(ran.out)["rows"]
    assert ran.code == 0 and [row["mode"] for row in rows] == ["intact", "zero"]
    assert rows == list(read_rows(tmp_path / "k" / "knockout.jsonl"))
    assert vlmgraft(*asked, "--out", tmp_path / "k").code == 2
    ran = vlmgraft(*asked, "--out", tmp_path / "k", "--resume")
    assert ran.code == 0 and "mlp, layer 3" in ran.out


def test_sweep_overlays_methods_and_leaves_out_what_a_method_has_not(
    vlmgraft: Run, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    files = recipe("ta", name="task_arithmetic"), recipe("star", name="spectral", rule="star")
    asked = ("sweep", *files, "--grid", "method.scale=0.5,1", "--grid", "method.eta=0.9", "--samples", "8")
    ran = vlmgraft(*asked, "--out", tmp_path / "s", "--quiet", "--json")
    rows = json.loads(ran.out)["rows"]
    assert ran.code == 0, ran.err
    assert [(row["method"], row["setting"]) for row in rows] == [
        ("VLM", ""),
        ("task_arithmetic", "λ 0.5"),
        ("task_arithmetic", "λ 1"),
        ("spectral", "λ 0.5, eta 0.9"),
        ("spectral", "λ 1, eta 0.9"),
    ]
    assert rows[0]["kl"] == 0 and 0 < rows[1]["kl"] < rows[2]["kl"]
    assert set(json.loads((tmp_path / "s" / "sweep.recipes.json").read_text())) == {row["id"] for row in rows[1:]}
    assert "*" in vlmgraft(*asked, "--out", tmp_path / "s", "--quiet", "--resume").out


def test_a_log_is_not_gone_on_with_after_its_inputs_changed(
    vlmgraft: Run, recipe: Callable[..., Path], trio: Path, tmp_path: Path
) -> None:
    """Other contents under the same names: a donor, the prompts of the KL, the length of answers, a link to a model."""
    donor, prompts, link = tmp_path / "d", tmp_path / "kl.jsonl", tmp_path / "m"
    shutil.copytree(trio / "donor", donor)
    exam = draw_exam(0, "calibration", {"colour": 4})
    save_questions(exam.questions[:2], prompts)
    file = yaml.safe_load(recipe("ta", name="task_arithmetic").read_text()) | {"donor": str(donor)}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(file))
    grid = ("--grid", "method.scale=0.5", "--drift", prompts, "--samples", "8", "--quiet")
    asked = ("sweep", tmp_path / "own.yaml", "--out", tmp_path / "s", *grid)
    assert vlmgraft(*asked).code == 0 and vlmgraft(*asked, "--resume").code == 0
    ran = vlmgraft(*asked, "--resume", "--max-new-tokens", "2")
    assert ran.code == 2 and "at most 2 tokens" in ran.err
    before = prompts.read_text()
    prompts.write_text(before.splitlines()[0])
    ran = vlmgraft(*asked, "--resume")
    assert ran.code == 2 and "was measured with KL prompts" in ran.err
    prompts.write_text(before)
    shutil.copyfile(trio / "base" / "model.safetensors", donor / "model.safetensors")
    ran = vlmgraft(*asked, "--resume")
    assert ran.code == 2 and "other contents of the donors" in ran.err, ran.err
    link.symlink_to(trio / "vlm")
    asked = ("knockout", link, "--samples", "8", "--layers", "3", "--part", "mlp", "--mode", "zero", "--quiet")
    assert vlmgraft(*asked, "--out", tmp_path / "k").code == 0
    shutil.copytree(trio / "vlm", tmp_path / "changed")
    weights = load_file(trio / "vlm" / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, tmp_path / "changed" / "model.safetensors")
    link.unlink()
    link.symlink_to(tmp_path / "changed")
    ran = vlmgraft(*asked, "--out", tmp_path / "k", "--resume")
    assert ran.code == 2 and "was measured with weights" in ran.err


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("method.typo=1", "no recipe"),
        ("method.scale=x:y", "scale"),
        ("vlm=/tmp,/", "different VLMs"),
        ("nobody:method.scale=1", "no recipe nobody"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_a_model_is_loaded(
    vlmgraft: Run, recipe: Callable[..., Path], tmp_path: Path, grid: str, message: str
) -> None:
    ran = vlmgraft("sweep", recipe("ta", name="task_arithmetic"), "--grid", grid, "--out", tmp_path / "s", "--quiet")
    assert ran.code == 2 and message in ran.err and not (tmp_path / "s").exists()


def test_gates_are_learned_on_the_loaded_model(
    vlmgraft: Run, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FRISM over α in one sweep: more injection, more KL; the questions are read once."""
    read, load = Counter[str](), questions.load_questions

    def counted(data: Any, **more: Any) -> Any:
        read.update([str(data)])
        return load(data, **more)

    monkeypatch.setattr(questions, "load_questions", counted)
    save_questions(draw_exam(0, "calibration", {"colour": 8, "read": 8}).questions, tmp_path / "c.jsonl")
    calibration = {"data": str(tmp_path / "c.jsonl"), "samples": 16, "held_out": 0, "max_new_tokens": 8}
    frism = recipe("f", name="frism", steps=6, learning_rate=0.2, calibration={**calibration, "batch_size": 16})
    ran = vlmgraft(
        "sweep", frism, "--grid", "method.inject_weight=0.0001,10", "--samples", "4", "--out", tmp_path / "s",
        "--quiet", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)["rows"]
    assert [row["setting"] for row in rows[1:]] == ["α 0.0001", "α 10"] and 0 < rows[1]["kl"] < rows[2]["kl"]
    assert read == {str(tmp_path / "c.jsonl"): 1}


def test_ranks(vlmgraft: Run, recipe: Callable[..., Path], tmp_path: Path) -> None:
    asked = ("ranks", recipe("ta", name="task_arithmetic"), "--bands", "2", "--scale", "1", "--samples", "4")
    ran = vlmgraft(*asked, "--by", "energy", "--out", tmp_path / "r", "--quiet")
    assert ran.code == 0 and "2 of 2" in ran.out
    assert len(list(read_rows(tmp_path / "r" / "ranks.jsonl"))) == 4


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
