"""The command `sweep` on the lab, end to end and small: rows, overlays, refusals, gates on the loaded model."""

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

Run = Callable[..., Any]


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


def test_recipes_are_called_by_method_or_by_file(vlmgraft: Run, recipe: Callable[..., Path], stand_in: Run) -> None:
    """Two of one method by their files' names; of one name they are refused."""
    asked = stand_in("vlmgraft.analysis.recipe_sweep", "sweep", [])
    spectral = recipe("a", name="spectral", scale=1.0), recipe("b", name="spectral", scale=0.5)
    plain = recipe("c", name="task_arithmetic")
    assert vlmgraft("sweep", *spectral, plain, "--grid", "method.scale=1", "-o", "out", "-q").code == 0
    ((recipes, grid, out, _), options) = asked[0]
    assert {name: one.method.scale for name, one in recipes.items()} == {"a": 1.0, "b": 0.5, "task_arithmetic": 1.0}
    assert (grid, out, options) == (["method.scale=1"], Path("out"), {"resume": False, "progress": None})
    ran = vlmgraft("sweep", spectral[0], spectral[0], "-o", "out", "-q")
    assert ran.code == 2 and "two recipes would both be called 'a'" in ran.err and len(asked) == 1
