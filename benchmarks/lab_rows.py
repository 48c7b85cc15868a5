"""The rows of `lab_variants.py` by base seed, and differences over seeds, paired by item."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lab.experiments import point_of
from vlmgraft.evaluation.intervals import Estimate, bootstrap
from vlmgraft.lab.compare import Point, above_items
from vlmgraft.storage.jsonl import read_rows

ARITHMETIC = "task arithmetic"
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % point of Student's t by number of seeds."""

Row = dict[str, Any]
Items = np.ndarray


@dataclass(frozen=True)
class Trio:
    """The rows of one base seed."""

    seed: int
    head: Row
    rows: Mapping[str, Row]

    def row(self, method: str, **setting: Any) -> Row | None:
        """The row of a method and its setting."""
        return self.rows.get(json.dumps([method, setting], sort_keys=True))

    @cached_property
    def curve(self) -> list[Point]:
        """The VLM and every row of task arithmetic."""
        return [point_of(row) for row in self.rows.values() if row["method"] in ("VLM", ARITHMETIC)]

    def above(self, row: Row) -> Items | None:
        """Per sum, what the row solves above task arithmetic at its own KL."""
        return above_items(point_of(row), self.curve, lambda point: point.kl)


def read_trio(file: Path) -> Trio:
    """The rows of one file."""
    head, *rows = read_rows(file)
    keyed = {json.dumps([row["method"], row["setting"]], sort_keys=True): row for row in rows}
    return Trio(head["about"]["trio"], head, keyed)


def signed(estimate: Estimate) -> str:
    return estimate.signed()


def has_budget(row: Row) -> bool:
    """Whether it is an exam at a budget."""
    return "budget" in row["setting"] and "right" in row


def over_seeds(values: Sequence[Items | None]) -> tuple[str, dict[str, Any] | None]:
    """Mean over seeds with an interval over items and one over seeds; nothing unless every seed has a value."""
    arrays = [value for value in values if value is not None]
    if len(arrays) < len(values):
        return "", None
    items = bootstrap(arrays)
    text, data = signed(items), {"items": asdict(items)}
    if len(arrays) in STUDENT:
        means = [float(array.mean()) for array in arrays]
        half = STUDENT[len(means)] * float(np.std(means, ddof=1)) / math.sqrt(len(means))
        text += f"; [{100 * (items.mean - half):+.1f}, {100 * (items.mean + half):+.1f}]"
        data["seeds"] = {"low": items.mean - half, "high": items.mean + half}
    return text, data
