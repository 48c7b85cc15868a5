"""From records to a summary and its table: scores with intervals, and counts that show how reliable they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlmgraft.evaluation.intervals import LEVEL, RESAMPLES, Estimate, score_interval
from vlmgraft.evaluation.judge import agreement
from vlmgraft.evaluation.metrics import all_right, binary, four_way
from vlmgraft.evaluation.records import Record

COUNTED = ("scored", "failed")
KINDS = ("reasoning", "perception", "other")
DOUBTS = ("unscored", "not asked", "failed", "cut", "not read", "loops", "empty")
COLUMNS = ("task", "kind", "measure", "score", "items", *DOUBTS, "tokens")


@dataclass(frozen=True)
class Counts:
    """Numbers of items: all, scored, right, and those that cast doubt on the score. tokens: mean per answer."""

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
    """All tasks, and the mean over the tasks of each kind (with equal weights)."""

    tasks: tuple[TaskScore, ...]
    averages: Mapping[str, Estimate]
    counts: Counts
    duplicates: int = 0
    faults: Mapping[str, int] = field(default_factory=dict)

    def _repr_markdown_(self) -> str:
        """The table, in notebooks."""
        return summary_table(self)


def units(records: Sequence[Record]) -> dict[str, float]:
    """The scores whose mean is a task's headline score: unit id → score in [0, 1].

    A unit is an item; all rotations of a question, right only if all are; or a WeMath problem, 1 if it and all its
    steps are right, ½ if only the problem is wrong, else 0 (the strict score).
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


def task_names(records: Sequence[Record]) -> dict[tuple[str, str], str]:
    """(task, kind) → name of a task in a summary: "TASK (KIND)" if the task has items of several kinds."""
    found = dict.fromkeys((record.task, record.kind) for record in records)
    kinds = Counter(task for task, _ in found)
    return {(task, kind): task if kinds[task] == 1 else f"{task} ({kind})" for task, kind in found}


def summarise(
    records: Sequence[Record], *, duplicates: int = 0, seed: int = 0, judged: Mapping[str, bool | None] | None = None
) -> Summary:
    """The summary of a run. Tasks appear in the order of the records; intervals are deterministic in `seed`.

    judged: a judge's verdicts by record id; its score and its agreement with the rules are added to each task.
    """
    names = task_names(records)
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(names[record.task, record.kind], []).append(record)
    tasks = tuple(_task(name, rows, seed, judged or {}) for name, rows in by_task.items())
    averages = {}
    for kind in KINDS:
        groups = [list(units(by_task[task.task]).values()) for task in tasks if task.kind == kind and task.score]
        if groups:
            averages[kind] = score_interval(groups, seed)
    faults: dict[str, int] = {}
    for record in records:
        if record.fault:
            faults[record.fault] = faults.get(record.fault, 0) + 1
    return Summary(tasks, averages, count(records), duplicates, dict(sorted(faults.items(), key=lambda pair: -pair[1])))


def count(records: Sequence[Record]) -> Counts:
    """The counts of some records."""
    states = [record.state for record in records]
    answered = [record for record in records if record.state in ("scored", "unscored")]
    return Counts(
        items=len(records),
        scored=sum(state in COUNTED for state in states),
        right=sum(record.score == 1 for record in records),
        unscored=states.count("unscored"),
        not_asked=states.count("not asked"),
        failed=states.count("failed"),
        cut=sum(record.cut for record in answered),
        not_found=sum(not record.found for record in answered),
        repeated=sum(record.repeated for record in answered),
        empty=sum(record.empty for record in records),
        tokens=round(sum(record.tokens for record in answered) / max(1, len(answered)), 2),
    )


def _task(name: str, records: Sequence[Record], seed: int, judged: Mapping[str, bool | None]) -> TaskScore:
    values = list(units(records).values())
    pairing, metric = records[0].pairing, records[0].metric
    measure = {"four_way": "strict score", "all_right": "all rotations right"}.get(pairing)
    measure = measure or {"vqa": "VQA accuracy", "relaxed": "relaxed accuracy"}.get(metric, "accuracy")
    scored = [record for record in records if record.score is not None]
    others: dict[str, float] = {}
    if scored:
        others = _pairing_scores(pairing, scored) | (_stances(scored, seed) if metric in ("yes_no", "pope") else {})
        others |= agreement(scored, judged)
    return TaskScore(
        name,
        records[0].kind,
        measure,
        score_interval([values], seed) if values else None,
        count(records),
        others,
        _categories(scored),
    )


def _pairing_scores(pairing: str, records: Sequence[Record]) -> dict[str, float]:
    groups: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for name, group in zip(("question", "figure"), record.group.split("|"), strict=False):
            groups.setdefault(name, {}).setdefault(group, []).append(float(record.score or 0))
    item_mean = float(np.mean([record.score for record in records]))
    if pairing == "worst":
        return {"worst case": all_right(groups["question"])}
    if pairing == "pairs":
        return {f"{name} accuracy": all_right(scores) for name, scores in groups.items()}
    if pairing == "all_right":
        return {"item accuracy": item_mean}
    if pairing == "four_way" and (problems := list(_problems(records).values())):
        return {"item accuracy": item_mean} | four_way(problems)
    return {}


def _stances(records: Sequence[Record], seed: int) -> dict[str, float]:
    """POPE's precision, recall, F1 (with its interval) and share of yes."""
    answers = [record.answer == "yes" for record in records]
    truth = [record.expected[0].strip().lower() in ("yes", "true", "1") for record in records]
    low, high = _f1_interval(np.array(answers), np.array(truth), seed) if len(records) > 1 else (0.0, 1.0)
    return binary(answers, truth) | {"F1 low": low, "F1 high": high}


def _f1_interval(answers: np.ndarray, truth: np.ndarray, seed: int) -> tuple[float, float]:
    from scipy import stats

    def f1(yes: np.ndarray, positive: np.ndarray, axis: int = -1) -> np.ndarray:
        total = yes.sum(axis) + positive.sum(axis)
        return np.where(total > 0, 2 * (yes & positive).sum(axis) / np.maximum(total, 1), 0.0)

    how = {"n_resamples": RESAMPLES, "confidence_level": LEVEL, "method": "percentile", "vectorized": True}
    rng = np.random.default_rng(seed)
    low, high = stats.bootstrap((answers, truth), f1, paired=True, rng=rng, **how).confidence_interval
    return float(low), float(high)


def _categories(records: Sequence[Record]) -> dict[str, tuple[float, int]]:
    by_category: dict[str, list[float]] = {}
    for record in records:
        if record.category:
            by_category.setdefault(record.category, []).append(float(record.score or 0))
    if len(by_category) < 2:
        return {}
    return {name: (float(np.mean(scores)), len(scores)) for name, scores in by_category.items()}


def _problems(records: Sequence[Record]) -> dict[str, tuple[list[bool], bool]]:
    """WeMath's problems by id, as (steps right, problem right); problems that lack either are left out."""
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


def summary_table(summary: Summary) -> str:
    """Scores in percent with 95 % intervals, beside the counts that cast doubt on them."""
    lines = [markdown_line(list(COLUMNS)), "|" + "---|" * len(COLUMNS)]
    lines += [markdown_line(_cells(task)) for task in summary.tasks]
    for kind, estimate in summary.averages.items():
        if len([task for task in summary.tasks if task.kind == kind]) > 1:
            lines.append(markdown_line([f"{kind} average", "", "mean over tasks", estimate.percent(), *[""] * 9]))
    notes = [f"- {task.task}: {others}" for task in summary.tasks if (others := _others(task))]
    if summary.duplicates:
        notes.append(f"- {summary.duplicates} ids stood twice; the later ones were renamed")
    shown = list(summary.faults.items())[:5]
    notes += [f"- {number} × {' '.join(fault.split())}" for fault, number in shown]
    if len(summary.faults) > len(shown):
        notes.append(f"- and {len(summary.faults) - len(shown)} other faults, in records.jsonl")
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def _cells(task: TaskScore) -> list[str]:
    counts: Counts = task.counts
    figures = (counts.items, counts.unscored, counts.not_asked, counts.failed, counts.cut)
    doubts = (counts.not_found, counts.repeated, counts.empty)
    score = task.score.percent() if task.score else "–"
    return [task.task, task.kind, task.measure, score, *map(str, figures + doubts), f"{counts.tokens:.1f}"]


def _others(task: TaskScore) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:g}" if name == "problems" else f"{name.replace('_', ' ')} {100 * value:.1f}"
        for name, value in task.others.items()
    )


def markdown_line(cells: list[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |"
