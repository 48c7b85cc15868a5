"""The command `gates`: what reaches the learning, and what it says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlmgraft.errors import CheckpointError, NumericalError

Run = Callable[..., Any]
LEARNED = SimpleNamespace(logits={"a": 0, "b": 0, "c": 0}, settings={"scale": 1.0, "steps": 20})


def test_recipe_factors_and_overrides_reach_the_learning(vlmgraft: Run, stand_in: Run, tmp_path: Path) -> None:
    asked = stand_in("vlmgraft.pipeline", "gates", LEARNED)
    words = ("gates", "r.yaml", "--factors", "f", "-o", tmp_path / "g", "--set", "method.steps=9", "--set", "layers=0")
    ran = vlmgraft(*words, "--quiet", "--json")
    assert json.loads(ran.out) == {"out": str(tmp_path / "g"), "matrices": 3, "settings": {"scale": 1.0, "steps": 20}}
    expected = {"overrides": ["method.steps=9", "layers=0"], "progress": None}
    assert asked == [((Path("r.yaml"), Path("f"), tmp_path / "g"), expected)]
    assert vlmgraft(*words).out.startswith(f"{tmp_path / 'g'}: gates of 3 matrices, ")
    assert asked[1][1]["progress"] is not None, "without --quiet it is told"


def test_an_error_is_its_exit_code_and_one_line(vlmgraft: Run, stand_in: Run, tmp_path: Path) -> None:
    for error, code in ((CheckpointError("f: no factors"), 2), (NumericalError("a: NaN"), 1)):
        stand_in("vlmgraft.pipeline", "gates", error)
        ran = vlmgraft("gates", "r.yaml", "--factors", "f", "-o", tmp_path / "g", "-q")
        assert (ran.code, ran.out, ran.err) == (code, "", f"vlmgraft: {error}\n")


def test_factors_are_asked_for(vlmgraft: Run) -> None:
    ran = vlmgraft("gates", "r.yaml", "-o", "g")
    assert ran.code == 2 and "--factors" in ran.err
