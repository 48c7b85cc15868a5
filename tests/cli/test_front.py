"""The command `front`: a row of budgets, and what each buys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Run = Callable[..., Any]
POINTS = [
    SimpleNamespace(budget=0.01, held_out_kl=0.0098, energy=0.25),
    SimpleNamespace(budget=0.02, held_out_kl=0.0199, energy=0.5),
]


@pytest.mark.parametrize(("budgets", "expected"), [("0.01,0.02", [0.01, 0.02]), ("0.01:0.03:0.01", [0.01, 0.02, 0.03])])
def test_budgets_are_a_list_or_a_range(
    budgets: str, expected: list[float], vlmgraft: Run, stand_in: Run, tmp_path: Path
) -> None:
    asked = stand_in("vlmgraft.distillation.front", "front", POINTS)
    words = ("front", "r.yaml", "--factors", "f", "--budgets", budgets, "-o", tmp_path / "o", "--set", "layers=0", "-q")
    rows = json.loads(vlmgraft(*words, "--json").out)["rows"]
    assert rows == [vars(point) for point in POINTS]
    ((recipe, factors, out, found), options) = asked[0]
    assert (recipe, factors, out, options) == (
        Path("r.yaml"), Path("f"), tmp_path / "o", {"overrides": ["layers=0"], "progress": None},
    )  # fmt: skip
    assert found == pytest.approx(expected)
    table = vlmgraft(*words).out
    assert "held_out_kl" in table and "0.0199" in table and "0.25" in table


@pytest.mark.parametrize("budgets", ["0.01:0.02:0", "[", ""])
def test_budgets_that_are_none_are_refused_before_any_work(budgets: str, vlmgraft: Run, stand_in: Run) -> None:
    asked = stand_in("vlmgraft.distillation.front", "front")
    ran = vlmgraft("front", "r.yaml", "--factors", "f", "--budgets", budgets, "-o", "o")
    assert ran.code == 2 and "budgets=" in ran.err and asked == []
