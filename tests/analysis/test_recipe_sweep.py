"""Sweeps: the front is marked, rows are found again, grids reach the recipes that they name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis_tools import LogitExam

from vlmgraft.analysis.bench import Bench
from vlmgraft.analysis.in_memory import Rebuilder
from vlmgraft.analysis.recipe_sweep import SweepPoint, _grids_of, run_sweep, with_front
from vlmgraft.methods import METHODS


def test_a_sweep_marks_its_front_and_goes_on(vlm_model: Any, alignment: Any, tmp_path: Path) -> None:
    built: list[float] = []
    with Rebuilder(alignment) as rebuilder:

        def make(scale: float) -> Any:
            built.append(scale)
            return rebuilder.weights(METHODS["task_arithmetic"](scale=scale))

        points = [SweepPoint(f"p{s}", "ta", {"method.scale": s}, lambda s=s: make(s)) for s in (0.5, 1.0, 2.0)]
        bench = Bench(vlm_model, None, LogitExam(), tmp_path, {}, kl_from=lambda model: 0.5)
        first = run_sweep(bench, points[:2])
        rows = run_sweep(replace(bench, resume=True), points)
    assert built == [0.5, 1.0, 2.0]
    assert [row["setting"] for row in rows] == ["", "λ 0.5", "λ 1", "λ 2"] and rows[1]["order"] == 0.5
    assert [{**row, "front": None} for row in rows[:3]] == [{**row, "front": None} for row in first]
    best = max(rows, key=lambda row: (row["reasoning"]["mean"], row["perception"]["mean"]))
    assert best["front"] and any(row["front"] for row in rows)


def test_settings_are_said_in_words() -> None:
    point = SweepPoint("p", "m", {"method.rank": {"energy": 0.5}, "method.scale": 0.25, "modules": "mlp"}, dict)
    assert point.cell["setting"] == "rank energy 0.5, λ 0.25, modules mlp" and point.cell["order"] == 0.25


def test_a_grid_of_one_recipe_replaces_the_general_one() -> None:
    grids = ["method.scale=0,1", "ties:method.scale=2", "ties:method.density=0.5"]
    assert _grids_of("ties", grids) == ["method.scale=2", "method.density=0.5"]
    assert _grids_of("ta", grids) == ["method.scale=0,1"]


def test_the_front_is_what_no_other_row_beats() -> None:
    scores = {"a": (0.9, 0.1), "b": (0.8, 0.5), "c": (0.8, 0.4), "d": (0.2, 0.6), "e": (0.1, 0.6)}
    rows = [{"id": name, "perception": {"mean": p}, "reasoning": {"mean": r}} for name, (p, r) in scores.items()]
    assert [row["id"] for row in with_front(rows) if row["front"]] == ["a", "b", "d"]
