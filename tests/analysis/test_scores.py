"""Scores of one run, and paired changes between two."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vlmgraft.analysis.scores import change, summarise

EVALUATOR = SimpleNamespace(reasoning=["sum"], perception=["colour", "read"], label="")


def test_tasks_count_alike_whatever_their_size() -> None:
    right = {"sum": [True, False, False, False], "colour": [True] * 10, "read": [False, True]}
    scores = summarise(right, EVALUATOR)  # type: ignore[arg-type]
    assert (scores.reasoning.mean, scores.perception.mean) == (0.25, pytest.approx((1 + 0.5) / 2))
    assert scores.tasks == {"sum": 0.25, "colour": 1, "read": 0.5}
    assert scores.right == {"sum": "1000", "colour": "1" * 10, "read": "01"}


def test_all_right_has_an_interval() -> None:
    scores = summarise({"sum": [True] * 20, "colour": [True], "read": [False]}, EVALUATOR)  # type: ignore[arg-type]
    assert scores.reasoning.high == 1 and scores.reasoning.low == pytest.approx(20 / (20 + 1.959964**2))


def test_a_change_is_paired_by_item() -> None:
    """Two items lost, one won, of four: −1/4, though the scores alone do not say which."""
    moved = change({"sum": "1100"}, {"sum": "0010"}, ["sum"])
    assert moved.mean == -0.25 and moved.low < -0.25 < moved.high
    assert change({"sum": "1100"}, {"sum": "1100"}, ["sum"]).high == 0
