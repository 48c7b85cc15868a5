"""From records to figures: scores with bootstrap intervals, and the counts that say how far to believe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vlmgraft.evaluation.intervals import RESAMPLES, Estimate, bootstrap
from vlmgraft.evaluation.metrics import all_right, binary, four_way
from vlmgraft.evaluation.run_records import Record

COUNTED = ("scored", "failed")
KINDS = ("reasoning", "perception", "other")


@dataclass(frozen=True)
class Counts:
    """How many items: asked, with a score, right; and what casts doubt on the score. tokens: mean per answer."""

    items: int
    scored: int
    right: int
    unscored: int
    not_asked: int
    failed: int
    cut: int
    not_found: int
    repeated: int
    empty: int
    tokens: float


@dataclass(frozen=True)
class TaskScore:
    """One task: `score` is the published headline measure (see docs/evaluate.md) with its 95 % interval, None when
    nothing could be scored; `others` the task's further measures; `categories` means and sizes by category."""

    task: str
    kind: str
    measure: str
    score: Estimate | None
    counts: Counts
    others: Mapping[str, float] = field(default_factory=dict)
    categories: Mapping[str, tuple[float, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """All tasks, and the mean over the tasks of each kind (every task counts alike)."""

    tasks: tuple[TaskScore, ...]
    averages: Mapping[str, Estimate]
    counts: Counts
    duplicates: int = 0
    faults: Mapping[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def _repr_markdown_(self) -> str:
        """The table, in notebooks."""
        from vlmgraft.evaluation.tables import summary_table

        return summary_table(self)


def units(records: Sequence[Record]) -> dict[str, float]:
    """What a task's headline is the mean of: unit id → score in [0, 1].

    A unit is an item; all rotations of a question, right only together; or a WeMath problem, 1 when it and all its
    steps are right, ½ when only the problem is wrong, else 0 (the strict score).
    """
    grouped = {record.pairing for record in records}
    counted = [record for record in records if record.state in COUNTED and record.score is not None]
    if "four_way" in grouped:
        return {name: _mastery(steps, whole) for name, (steps, whole) in _problems(counted).items()}
    result: dict[str, float] = {}
    for record in counted:
        assert record.score is not None
        if record.pairing == "all_right":
            result[record.group] = min(result.get(record.group, 1.0), float(record.score == 1))
        else:
            result[record.id] = record.score
    return result


def summarise(records: Sequence[Record], *, duplicates: int = 0, seed: int = 0) -> Summary:
    """The figures of a run. Tasks appear in the order of the records; intervals are deterministic in `seed`."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    tasks = tuple(_task(name, rows, seed) for name, rows in by_task.items())
    averages = {}
    for kind in KINDS:
        groups = [list(units(by_task[task.task]).values()) for task in tasks if task.kind == kind and task.score]
        if groups:
            averages[kind] = bootstrap(groups, seed)
    faults: dict[str, int] = {}
    for record in records:
        if record.fault:
            faults[record.fault] = faults.get(record.fault, 0) + 1
    return Summary(tasks, averages, count(records), duplicates, dict(sorted(faults.items(), key=lambda pair: -pair[1])))


def count(records: Sequence[Record]) -> Counts:
    """The counts of some records."""
    states = [record.state for record in records]
    asked = [record for record in records if record.state in ("scored", "unscored")]
    return Counts(
        items=len(records),
        scored=sum(state in COUNTED for state in states),
        right=sum(record.score == 1 for record in records),
        unscored=states.count("unscored"),
        not_asked=states.count("not asked"),
        failed=states.count("failed"),
        cut=sum(record.cut for record in asked),
        not_found=sum(not record.found for record in asked),
        repeated=sum(record.repeated for record in asked),
        empty=sum(record.empty for record in records),
        tokens=round(sum(record.tokens for record in asked) / max(1, len(asked)), 2),
    )


def _task(name: str, records: Sequence[Record], seed: int) -> TaskScore:
    values = list(units(records).values())
    pairing, metric = records[0].pairing, records[0].metric
    measure = {"four_way": "strict score", "all_right": "all rotations right"}.get(pairing)
    measure = measure or {"vqa": "VQA accuracy", "relaxed": "relaxed accuracy"}.get(metric, "accuracy")
    scored = [record for record in records if record.score is not None]
    others: dict[str, float] = {}
    if scored:
        others = _pairing_scores(pairing, scored) | (_stances(scored, seed) if metric == "yes_no" else {})
    return TaskScore(
        name,
        records[0].kind,
        measure,
        bootstrap([values], seed) if values else None,
        count(records),
        others,
        _categories(scored),
    )


def _pairing_scores(pairing: str, records: Sequence[Record]) -> dict[str, float]:
    """The further measures of tasks whose items belong together."""
    groups: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for name, group in zip(("question", "figure"), record.group.split("|"), strict=False):
            groups.setdefault(name, {}).setdefault(group, []).append(float(record.score or 0))
    item_mean = float(np.mean([record.score for record in records]))
    if pairing == "worst":
        return {"worst case": all_right(groups["question"])}
    if pairing == "pairs":
        return {f"{name} accuracy": all_right(found) for name, found in groups.items()}
    if pairing == "all_right":
        return {"item accuracy": item_mean}
    if pairing == "four_way" and (problems := list(_problems(records).values())):
        return {"item accuracy": item_mean} | {key: float(value) for key, value in asdict(four_way(problems)).items()}
    return {}


def _stances(records: Sequence[Record], seed: int) -> dict[str, float]:
    """POPE's precision, recall, F1 (with its interval) and share of yes."""
    said = [record.answer == "yes" for record in records]
    true = [record.expected[0].strip().lower() in ("yes", "true", "1") for record in records]
    found = binary(said, true, [record.score == 1 for record in records])
    draws = np.random.default_rng(seed).integers(len(records), size=(RESAMPLES, len(records)))
    yes, positive = np.array(said)[draws], np.array(true)[draws]
    both, total = (yes & positive).sum(1), yes.sum(1) + positive.sum(1)
    low, high = np.quantile(np.where(total > 0, 2 * both / np.maximum(total, 1), 0.0), [0.025, 0.975])
    figures = {"precision": found.precision, "recall": found.recall, "yes share": found.yes_share}
    return {"F1": found.f1, "F1 low": float(low), "F1 high": float(high), **figures}


def _categories(records: Sequence[Record]) -> dict[str, tuple[float, int]]:
    found: dict[str, list[float]] = {}
    for record in records:
        if record.category:
            found.setdefault(record.category, []).append(float(record.score or 0))
    return {name: (float(np.mean(scores)), len(scores)) for name, scores in found.items()} if len(found) > 1 else {}


def _problems(records: Sequence[Record]) -> dict[str, tuple[list[bool], bool]]:
    """WeMath's problems by id: their steps and the whole, problems without either left out."""
    steps: dict[str, list[bool]] = {}
    whole: dict[str, bool] = {}
    for record in records:
        if record.part.endswith("multi"):
            whole[record.group] = record.score == 1
        else:
            steps.setdefault(record.group, []).append(record.score == 1)
    return {name: (steps[name], right) for name, right in whole.items() if name in steps}


def _mastery(steps: Sequence[bool], whole: bool) -> float:
    return 0.0 if not all(steps) else 1.0 if whole else 0.5
