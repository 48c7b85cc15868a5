"""A row of budgets from one run, gone on with after an interruption; and what a front refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import vlmgraft as vg
from tests.distillation.test_learn import recipe_of
from vlmgraft.distillation.front import front
from vlmgraft.errors import RecipeError
from vlmgraft.spectral.gate_store import load_gates
from vlmgraft.storage.jsonl import read_rows


@pytest.mark.filterwarnings("ignore:kl_budget is measured")
@pytest.mark.filterwarnings("ignore:kl_budget is measured")
def test_a_front_of_budgets_from_one_run_and_after_an_interruption(
    trio: Path, image_calibration: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(trio, image_calibration, granularity="matrix")
    vg.decompose(recipe, tmp_path / "factors")
    budgets = [0.005, 0.02, 0.01]
    points = front(recipe, tmp_path / "factors", tmp_path / "front", budgets)
    rows = list(read_rows(tmp_path / "front" / "front.jsonl"))
    assert [row["budget"] for row in rows] == [point.budget for point in points] == sorted(budgets)
    assert all(0.9 * row["budget"] < row["held_out_kl"] <= row["budget"] for row in rows)
    assert [row["energy"] for row in rows] == sorted(row["energy"] for row in rows)
    again = load_gates(tmp_path / "front" / "0.01")
    assert again.settings["kl_budget"] == 0.01 and again.settings["granularity"] == "matrix"
    stamps = {b: (tmp_path / "front" / f"{b:g}" / "gates.safetensors").stat().st_mtime_ns for b in budgets}
    shutil.rmtree(tmp_path / "front" / "0.005")
    (tmp_path / "front" / "front.jsonl").unlink()
    repeated = front(recipe, tmp_path / "factors", tmp_path / "front", budgets)
    for b in (0.01, 0.02):
        assert (tmp_path / "front" / f"{b:g}" / "gates.safetensors").stat().st_mtime_ns == stamps[b], "made once"
    assert [point.energy for point in repeated] == pytest.approx([point.energy for point in points])
    with pytest.raises(RecipeError, match="budget"):
        front(recipe, tmp_path / "factors", tmp_path / "none", [])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"start": "curvature"}, "starts each point from its neighbour"),
        ({"budget_guarantee": {"prompts": 4}}, "a front has none"),
    ],
)
def test_a_front_refuses_other_methods_before_any_work(
    options: dict[str, Any], sentence: str, trio: Path, image_calibration: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(trio, image_calibration, inject_weight=None, **options)
    with pytest.raises(RecipeError, match=sentence):
        front(recipe, tmp_path / "factors", tmp_path / "front", [0.01])
    assert not (tmp_path / "front").exists()
