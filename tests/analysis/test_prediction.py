"""`predict_perception`: the KL of task arithmetic at several λ, and the chance that the record gives for it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

import vlmgraft as vg
from vlmgraft.analysis.prediction import INTERCEPT, SLOPE, chance_that_perception_holds, predict_perception
from vlmgraft.errors import AlignmentError
from vlmgraft.lab.exam import draw_exam, save_questions

ROOT = Path(__file__).parents[2]


def test_the_curve_is_that_of_the_record() -> None:
    text = (ROOT / "benchmarks" / "results" / "lab" / "prediction.md").read_text()
    found = re.search(r"log odds of safety (-?[\d.]+) \+ (-?[\d.]+) ln KL", text)
    assert found is not None
    assert (float(found[1]), float(found[2])) == (INTERCEPT, SLOPE)


@pytest.mark.parametrize("kl", [1e-4, 0.003, 0.0146, 0.05, 2.0, 1e9])
def test_a_chance_has_the_log_odds_of_the_curve(kl: float) -> None:
    chance = chance_that_perception_holds(kl)
    assert chance == pytest.approx(1 / (1 + math.e**-INTERCEPT * kl**-SLOPE))
    assert chance_that_perception_holds(2 * kl) <= chance
    assert chance_that_perception_holds(0.0) == 1.0


def test_the_kl_is_that_of_merged_folders(trio: Path, tmp_path: Path) -> None:
    file = save_questions(draw_exam(0, "calibration", {"colour": 4, "read": 4}), tmp_path / "questions.jsonl")
    recipe = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    half, whole = predict_perception(recipe, file, scales=(0.5, 1.0), max_new_tokens=12)
    for row in (half, whole):
        method = {"name": "task_arithmetic", "scale": row.scale}
        vg.merge({**recipe, "method": method, "output": {"dtype": "float32"}}, tmp_path / str(row.scale))
        measured = vg.analysis.kl_divergence(tmp_path / str(row.scale), trio / "vlm", file, max_new_tokens=12)
        assert row.kl == pytest.approx(measured, rel=1e-3)
        assert row.holds == chance_that_perception_holds(row.kl)
    assert half.kl < whole.kl
    with pytest.raises(AlignmentError, match="donor_base"):
        predict_perception({key: recipe[key] for key in ("vlm", "donor")}, file)
