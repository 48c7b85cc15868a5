"""The race: who is dropped, who wins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmgraft.analysis.choice import dominated
from vlmgraft.analysis.scores import Scores, from_marks
from vlmgraft.evaluation.intervals import bootstrap


class Kinds:
    reasoning = ("sum",)
    perception = ("read",)
    label = ""

    def __call__(self, model: Any) -> Any:
        raise NotImplementedError


def scored(sums: str) -> Scores:
    return from_marks({"sum": sums, "read": "10"}, Kinds())


def test_who_is_behind_beyond_chance_is_dropped() -> None:
    """100 paired items: 60 right; 20 of those wrong is beyond chance; two is not, and eight not for fifteen rules."""
    leader = "1" * 60 + "0" * 40
    scores = {
        "leader": scored(leader),
        "far": scored("0" * 20 + leader[20:]),
        "near": scored("00" + leader[2:]),
        "between": scored("0" * 6 + leader[6:]),
    }
    assert dominated(scores, ("sum",), 1) == ["far", "between"]
    assert dominated(scores, ("sum",), 15) == ["far"]
    assert dominated({"leader": scored(leader)}, ("sum",), 15) == []


def test_a_wider_level_is_a_wider_interval() -> None:
    """Bonferroni for fifteen rules, against the normal approximation: 2.94 standard errors in place of 1.96."""
    values = np.random.default_rng(0).random(400)
    error = values.std() / 20
    for level, deviations in ((0.95, 1.96), (1 - 0.05 / 15, 2.935)):
        estimate = bootstrap([values], level=level)
        assert (estimate.high - estimate.low) / 2 == pytest.approx(deviations * error, rel=0.1)
