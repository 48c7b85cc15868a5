"""Scores of a model in an analysis: right or wrong per question, by task, summarised as reasoning and perception.

An analysis does not depend on where questions come from. It is given an `Evaluator`, which takes a model in memory,
returns right or wrong per item, and says which of its tasks count as reasoning and which as perception.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vlmgraft.evaluation.intervals import LEVEL, Estimate, bootstrap, score_interval

Right = Mapping[str, Sequence[bool]]
"""Task → right or wrong per item, always in the same order of items."""


class Evaluator(Protocol):
    """A fixed set of questions for a model in memory."""

    reasoning: Sequence[str]
    perception: Sequence[str]

    @property
    def label(self) -> str:
        """Identifies the questions: equal labels mean equal questions; a log is resumed only under the same label."""

    def __call__(self, model: Any) -> Right:
        """Right or wrong per item, for the model in its current state."""


@dataclass(frozen=True)
class Scores:
    """A model's results: accuracies in [0, 1] with 95 % intervals, and the marks of the items as strings of 0 and 1."""

    reasoning: Estimate
    perception: Estimate
    tasks: dict[str, float]
    right: dict[str, str]


def summarise(right: Right, evaluator: Evaluator) -> Scores:
    """The accuracies of one run of an evaluator; tasks have equal weight, whatever their number of items."""
    return from_marks({task: "".join("01"[bool(mark)] for mark in marks) for task, marks in right.items()}, evaluator)


def from_marks(right: Mapping[str, str], evaluator: Evaluator) -> Scores:
    """The accuracies from strings of 0 and 1 by task."""
    marks = {task: _marks(text) for task, text in right.items()}
    return Scores(
        score_interval([marks[task] for task in evaluator.reasoning]),
        score_interval([marks[task] for task in evaluator.perception]),
        {task: float(values.mean()) for task, values in marks.items()},
        dict(right),
    )


def change(before: Mapping[str, str], after: Mapping[str, str], tasks: Sequence[str], level: float = LEVEL) -> Estimate:
    """Accuracy after minus before, paired by item, with its interval at a level. Both are `right` of a row."""
    return bootstrap([_marks(after[task]) - _marks(before[task]) for task in tasks], level=level)


def _marks(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(float) - ord("0")
