"""Predictions against outcomes: what counts as safe, and that no trio is judged by a rule fitted on itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from experiments.lab import prediction
from vlmgraft.lab.world import PERCEPTION


def row(method: str, trio: int, seen: str, summed: str, kl: float) -> dict[str, Any]:
    right = {"sum": summed, **dict.fromkeys(PERCEPTION, seen)}
    figures = dict.fromkeys(prediction.PREDICTORS.values(), kl) | {"nearer_0.25": kl}
    return {"method": method, "setting": {"trio": trio}, "right": right, "kl": kl / 2, **figures}


ROWS = [
    row("VLM", 0, "1" * 50, "1000000000", 0.0),
    row("donor, 1", 0, "1" * 49 + "0", "1100000000", 0.01),  # 2 points lost, 10 gained
    row("donor, 2", 0, "1" * 40 + "0" * 10, "1111111111", 0.5),
    row("VLM", 1, "1" * 50, "1000000000", 0.0),
    row("donor, 1", 1, "1" * 50, "1000000000", 0.02),
    row("donor, 2", 1, "1" * 48 + "00", "1110000000", 0.4),  # 4 points lost
]


def test_outcomes_are_against_the_trios_own_vlm() -> None:
    found = prediction.outcome(ROWS)
    assert [each["safe"] for each in found] == [True, False, True, False]
    assert [each["gains"] for each in found] == [True, True, False, True]
    assert found[3]["lost"] == pytest.approx(0.04) and found[3]["gained"] == pytest.approx(0.2)


def test_a_trio_is_judged_by_the_others() -> None:
    values, truth = np.array([0.01, 1.0, 0.01, 1.0]), np.array([True, False, False, True])
    held = prediction.probabilities(values, truth, np.array([0, 0, 1, 1]))
    assert held[0] < 0.5 < held[1], "trio 0 by trio 1's rule: a large value is safe"
    assert held[2] > 0.5 > held[3]


def test_the_table_counts() -> None:
    text = prediction.table(ROWS)
    assert "4 pairs of 2 trios; 2 are safe." in text and "| KL at λ 1 | 1.00 | 1.00, 1.00 |" in text
    assert "| nearer to the donor's answers at λ 0.25 | 0.67 |" in text  # of 3 gains, the one at .01 is below .02
    assert "| donor, 1 | 2.00, 2.00 | 2.0, 0.0 | 10.0, 0.0 |" in text
