"""Sweep: many settings of many methods on one loaded model, perception against reasoning.

Weights are swapped in place, so a point costs a rebuild and an exam. Methods on singular directions share one
decomposition; gates are learned on the same loaded model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmgraft.analysis.grid import pareto
from vlmgraft.analysis.log import CellLog, Progress
from vlmgraft.analysis.scores import Exam, summarise
from vlmgraft.analysis.swap import swapped, text_parameters

KEYS = ("id",)
VLM_POINT = "VLM"


@dataclass(frozen=True)
class Point:
    """One setting. id: equal for equal recipes. method: what it is called in tables and plots. setting: the fields of
    the grid. weights: gives the merged tensors by role when the point's turn comes."""

    id: str
    method: str
    setting: Mapping[str, Any]
    weights: Callable[[], Mapping[str, Tensor]]

    @property
    def cell(self) -> dict[str, Any]:
        """What a row says of the point beside its figures; `order` sorts a curve's points."""
        numbers = [value for value in self.setting.values() if isinstance(value, int | float)]
        said = ", ".join(f"{_short(key)} {_said(value)}" for key, value in self.setting.items())
        order = float(numbers[0]) if numbers else 0.0
        return {"id": self.id, "method": self.method, "setting": said, "fields": dict(self.setting), "order": order}


def run_sweep(
    model: Any,
    exam: Exam,
    points: Sequence[Point],
    folder: str | Path,
    settings: Mapping[str, Any],
    *,
    drift: Callable[[Any], float] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure the VLM and every point into `folder/sweep.jsonl`, and give the rows, with the Pareto front marked.

    drift: KL of the model as it is now from the VLM, nats per token. seconds: of rebuilding and of asking.
    """
    parameters = text_parameters(model)
    log = CellLog(folder, "sweep", KEYS, {**settings, "exam": exam.label}, resume=resume)
    vlm = Point(VLM_POINT, VLM_POINT, {}, dict)
    known = {point.id: point for point in (vlm, *points)}

    def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        weights = known[cell["id"]].weights()
        rebuilt = time.perf_counter()
        with swapped(parameters, weights):
            scores = asdict(summarise(exam(model), exam))
            kl = drift(model) if drift is not None else None
        asked = time.perf_counter()
        return {**scores, "kl": kl, "seconds": {"rebuild": rebuilt - began, "ask": asked - rebuilt}}

    rows = list(log.measure([point.cell for point in known.values()], measure, progress))
    return with_front(rows)


def with_front(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `front`: no other row is at least as good in perception and in reasoning, and better in one."""
    front = pareto([(row["perception"]["mean"], row["reasoning"]["mean"]) for row in rows])
    return [{**row, "front": on} for row, on in zip(rows, front, strict=True)]


def _short(key: str) -> str:
    name = key.rpartition(".")[2]
    return {"scale": "λ", "inject_weight": "α", "kl_budget": "ε"}.get(name, name)


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_said(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
