"""All rules on all trios: rows of a small race, and the table of rows made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.lab import prediction, rules
from experiments.lab.rules_table import cells, of_lab, of_pretrained, table
from vlmgraft.lab import trio_path
from vlmgraft.lab.compare import Sizes
from vlmgraft.storage.jsonl import read_rows


def lab_row(method: str, draw: int, right: str | None) -> dict[str, Any]:
    level = {} if right is None else {kind: {"mean": right.count("1") / 4} for kind in ("reasoning", "perception")}
    marks = None if right is None else {"reasoning: sum": right}
    return {"method": method, "draw": draw, "seed": 3, "right": marks, "seconds": 1.0 + draw, "strength": 0.5, **level}


LAB = [
    lab_row(method, draw, right)
    for draw, of_draw in enumerate(({"VLM": "0000", "task_arithmetic": "1100", "star": "1110", "sce": None},
                                    {"VLM": "0000", "task_arithmetic": "1000", "star": "0110", "sce": None}))
    for method, right in of_draw.items()
]  # fmt: skip


def test_a_cell_is_the_mean_over_draws_and_their_range() -> None:
    found = cells(of_lab(LAB))
    assert found["star"].startswith("+25.0 [") and found["star"].endswith("(+25.0 … +25.0)")
    assert found["VLM"].startswith("-37.5 [") and found["VLM"].endswith("(-50.0 … -25.0)")
    assert found["sce"] == "over the budget" and found["task_arithmetic"] == "0"


def pretrained_rows(*points: tuple[str, str, float, str, str]) -> list[dict[str, Any]]:
    return [
        {"method": method, "setting": setting, "split": split, "kl": kl, "right": {"sums": sums, "perception": seen}}
        for method, setting, kl, sums, seen in points
        for split in ("validation", "test")
    ]


PRETRAINED = pretrained_rows(
    ("VLM", "", 0.0, "0000", "1111"),
    ("task arithmetic", "λ 0.2", 0.02, "0011", "1110"),
    ("task arithmetic", "λ 0.4", 0.1, "1111", "1000"),
    ("STAR", "λ 0.1", 0.01, "0111", "1111"),
    ("STAR", "λ 0.9", 0.5, "0000", "0000"),
)


def test_a_pretrained_trio_is_compared_with_the_curve_at_the_setting_chosen_on_validation() -> None:
    """At 0.01 the curve lies halfway between 0, 0, 0, 0 and 0, 0, 1, 1: 25 % on average, where STAR has 75 %."""
    assert cells(of_pretrained(PRETRAINED))["star"].startswith("+50.0 [")


def test_a_row_per_rule_the_best_first() -> None:
    text = table({3: LAB}, {0: PRETRAINED})
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0][2:] for row in rows] == ["rule", "star", "task_arithmetic", "VLM", "sce"]
    assert rows[1][2].startswith("+50.0") and rows[1][4] == "1.5 |"
    assert "lab 3: 37.5 % of the sums" in text


def test_what_the_merges_of_a_pretrained_trio_lost() -> None:
    merges = prediction.merges_of(PRETRAINED)
    assert [merge["name"] for merge in merges] == [
        "STAR, λ 0.1", "task arithmetic, λ 0.2", "task arithmetic, λ 0.4", "STAR, λ 0.9"
    ]  # fmt: skip
    assert [merge["lost"] for merge in merges] == [0, 0.25, 0.75, 1]


def test_chances_are_a_logistic_curve_over_the_logarithm() -> None:
    """Safe below 0.01 and not above: even odds between them; at e² times the KL the log odds are lower by 2b."""
    kl, safe = np.array([1e-3, 3e-3, 3e-2, 1e-1]), np.array([True, True, False, False])
    curve = prediction.fitted(kl, safe)
    assert curve[1] < 0 and math.exp(-curve[0] / curve[1]) == pytest.approx(9.5e-3, rel=0.05)
    chance = prediction.chances((1.0, -2.0), np.array([1.0, math.e**2]))
    assert np.log(chance / (1 - chance)) == pytest.approx([1.0, -3.0])


@pytest.mark.slow
def test_a_small_race_is_written_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "SIZES", Sizes(calibration=8, donor=4, steps=1))
    monkeypatch.setattr(rules, "HELD_OUT", 8)
    monkeypatch.setattr(rules, "KL_PROMPTS", 8)
    rows = tmp_path / "rows.jsonl"
    measure = {"seed": 0, "draws": 1, "budget": 0.02, "samples": 16}
    rules.measure(trio_path(), tmp_path / "out", rows, **measure)
    first = rows.read_bytes()
    methods = [row["method"] for row in read_rows(rows)]
    assert methods[:2] == ["VLM", "task_arithmetic"]
    assert methods[-3:] == ["frism, energy", "frism, donor", "curvature"]
    assert {row["kl"] <= 0.02 for row in read_rows(rows) if row["strength"]} == {True}
    rules.measure(trio_path(), tmp_path / "out", rows, **measure)
    assert rows.read_bytes() == first and json.loads(first.splitlines()[0])["draw"] == 0
