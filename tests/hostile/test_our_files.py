"""Factors, gates, evaluations and logs that came from elsewhere, or were damaged: refused by the file's name.

A run of every kind is made once; each case puts something else in the place of one file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save, save_file

import vlmgraft as vg
from vlmgraft.analysis import EvalData
from vlmgraft.analysis.recipe_sweep import sweep
from vlmgraft.storage.jsonl import write_rows

Spoil = Callable[[Path], None]
GATES = ("gates", "{made}/recipe.yaml", "--factors", "{here}/factors", "--out", "{here}/out", "--quiet")
EXPORT = ("export", "{here}/gates", "--to", "lora", "--factors", "{here}/factors", "--vlm", "{trio}/vlm")
EXPORT += ("--out", "{here}/out")
COMPARE = ("compare", "{here}/run", "{made}/run", "--out", "{here}/out")
REPORT = ("report", "{here}", "--out", "{here}/out")
EVALUATE = ("evaluate", "{trio}/vlm", "--data", "{made}/asked.jsonl", "--out", "{here}/run", "--resume", "--limit", "3")
SWEEP = ("sweep", "{made}/plain.yaml", "--grid", "method.scale=1", "--data", "lab", "--samples", "2", "--resume")
SWEEP += ("--out", "{here}/sweep")


@pytest.fixture(scope="module")
def made(trio: Path, image_calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with factors, gates, an evaluation, a sweep and a merge."""
    home = tmp_path_factory.mktemp("made")
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    asked = {"data": str(image_calibration), "samples": 4, "held_out": 2, "max_new_tokens": 4, "batch_size": 4}
    frism = {"name": "frism", "steps": 1, "inject_weight": 0.1, "calibration": asked}
    recipes = {"recipe": {**places, "method": frism, "layers": "0"}, "plain": {**places, "method": "task_arithmetic"}}
    for name, recipe in recipes.items():
        (home / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    rows = [json.loads(line) for line in image_calibration.read_text().splitlines()][:3]
    rows = [{**row, "image": str(image_calibration.parent / row["image"]), "answer": "red"} for row in rows]
    write_rows(home / "asked.jsonl", rows)
    vg.decompose(home / "recipe.yaml", home / "factors")
    vg.gates(home / "recipe.yaml", home / "factors", home / "gates")
    vg.evaluate(places["vlm"], home / "asked.jsonl", home / "run", max_new_tokens=4, limit=3)
    sweep({"plain": home / "plain.yaml"}, ["method.scale=1"], home / "sweep", EvalData(samples=2))
    vg.merge(home / "plain.yaml", home / "merged")
    for file in (home / "merged").glob("*.safetensors"):
        file.unlink()
    return home


def text(file: str, data: bytes) -> Spoil:
    return lambda here: (here / file).write_bytes(data) and None


def tensors(file: str, **changes: Any) -> Spoil:
    """The tensors of a file, changed; None drops one. No header of ours is kept."""

    def spoil(here: Path) -> None:
        place = next(here.glob(file))
        found = {**load_file(place), **changes}
        save_file({name: value for name, value in found.items() if value is not None}, place)

    return spoil


def nan(file: str) -> Spoil:
    def spoil(here: Path) -> None:
        place = next(here.glob(file))
        save_file({name: value * np.nan for name, value in load_file(place).items()}, place)

    return spoil


LIES = {
    "empty": b"",
    "cut": b'{"a"',
    "list": b"[]\n",
    "number": b"3\n",
    "null": b"null\n",
    "deep": b"[" * 100_000 + b"\n",
    "digits": b"9" * 5000 + b"\n",
    "no text": b"\xff\xfe\n",
    "other keys": b'{"a": 1}\n',
    "other types": b'{"scale": {}, "matrices": 3, "digest": [], "averages": {"reasoning": 1, "perception": 1}, '
    b'"tensors": 1, "method": 1, "asking": 3, "verdict": 1}\n',
}
ONE = np.ones((2, 2), np.float32)
WHERE = {
    "factors/factors.json": GATES,
    "gates/gates.json": EXPORT,
    "run/records.jsonl": COMPARE,
    "run/run.json": EVALUATE,
    "run/summary.json": REPORT,
    "gates/training.jsonl": REPORT,
    "merged/receipt.json": REPORT,
    "sweep/sweep.jsonl": SWEEP,
    "sweep/sweep.run.json": SWEEP,
}
FINE = {
    ("run/records.jsonl", "empty"),  # as an interrupted run leaves it: refused for sharing no item
    ("run/records.jsonl", "cut"),
    ("gates/training.jsonl", "empty"),
    ("gates/training.jsonl", "cut"),
    ("gates/training.jsonl", "other keys"),
    ("gates/training.jsonl", "other types"),
    ("run/summary.json", "other keys"),  # of somebody else's: passed by
    ("merged/receipt.json", "other keys"),
    ("sweep/sweep.jsonl", "empty"),
    ("sweep/sweep.jsonl", "cut"),
}
CASES: dict[str, tuple[str, tuple[str, ...], Spoil]] = {
    f"{file}: {name}": (file, words, text(file, data))
    for file, words in WHERE.items()
    for name, data in LIES.items()
    if (file, name) not in FINE
}
CASES |= {
    "factors: names that lead elsewhere": (
        "factors/factors.json",
        EXPORT,
        text("factors/factors.json", b'{"digest": "x", "matrices": {"../../x": {}}}'),
    ),
    "factors: others than the gates'": (
        "factors",
        EXPORT,
        text("factors/factors.json", b'{"digest": "x", "matrices": {"x": {}}}'),
    ),
    "gates: scale is NaN": ("gates/gates.json", EXPORT, text("gates/gates.json", b'{"scale": NaN}')),
    "gates: no safetensors": ("gates/gates.safetensors", EXPORT, text("gates/gates.safetensors", b"x" * 99)),
    "gates: NaN": ("gates/gates.safetensors", EXPORT, nan("gates/gates.safetensors")),
    "gates: other lengths": (
        "gates",
        EXPORT,
        lambda here: (here / "gates/gates.safetensors").write_bytes(save(dict.fromkeys(names(here), ONE[0]))) and None,
    ),
    "gates: three dimensions": (
        "gates/gates.safetensors",
        EXPORT,
        tensors("gates/gates.safetensors", one=ONE[None]),
    ),
    "gates: of no tensor": ("gates", EXPORT, tensors("gates/gates.safetensors", nowhere=ONE[0])),
    "factors: no header": ("*q_proj*", EXPORT, tensors("factors/*q_proj*")),
    "factors: no U": ("*q_proj*", EXPORT, tensors("factors/*q_proj*", U=None)),
    "factors: other shapes": ("*q_proj*", EXPORT, tensors("factors/*q_proj*", s=ONE[0])),
    "report: no safetensors": ("gates/gates.safetensors", REPORT, text("gates/gates.safetensors", b"x" * 99)),
}


def names(here: Path) -> list[str]:
    return list(load_file(here / "gates/gates.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(case: str, made: Path, trio: Path, vlmgraft: Callable[..., Any], tmp_path: Path) -> None:
    file, words, spoil = CASES[case]
    for name in ("factors", "gates", "run", "sweep", "merged"):
        shutil.copytree(made / name, tmp_path / name)
    spoil(tmp_path)
    ran = vlmgraft(*(word.format(made=made, here=tmp_path, trio=trio) for word in words))
    assert ran.code == 2, (ran.code, ran.out, ran.err)
    said = ran.err.splitlines()[-1]
    assert said.startswith("vlmgraft: ") and said.isprintable() and "Traceback" not in ran.err
    assert Path(file).name.removesuffix(".run.json").strip("*") in said, said
    assert not (tmp_path / "out").exists()


def test_a_damaged_training_is_named(made: Path, vlmgraft: Callable[..., Any], tmp_path: Path) -> None:
    """What an interrupted training of gates kept, spoiled before it goes on."""
    state = tmp_path / "gates.state"
    words = ("gates", made / "recipe.yaml", "--factors", made / "factors", "--out", tmp_path / "gates", "--quiet")
    for bad in (b"x" * 99, save({"logits": ONE}), save({"logits": ONE}, {"state": "[]"})):
        state.write_bytes(bad)
        ran = vlmgraft(*words)
        assert ran.code == 2 and str(state) in ran.err and "remove it" in ran.err and "Traceback" not in ran.err
    state.unlink()
    assert vlmgraft(*words).code == 0
