"""Two models on the same items: paired differences with bootstrap intervals, and McNemar's exact test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmgraft.errors import DataError
from vlmgraft.evaluation.intervals import Estimate, bootstrap, score_interval
from vlmgraft.evaluation.records import Record
from vlmgraft.evaluation.summary import KINDS, markdown_line, task_names, units


@dataclass(frozen=True)
class TaskComparison:
    """One line of a comparison: a task, or the mean over the tasks of a kind.

    first, second: scores with their intervals; difference: second minus first, paired. only_first, only_second: number
    of units that only this model gets right; p: McNemar's exact two-sided test on them (None for averages, and unless
    all scores are 0 or 1). units: number of units that both models have a score for.
    """

    name: str
    kind: str
    first: Estimate
    second: Estimate
    difference: Estimate
    units: int
    only_first: int | None = None
    only_second: int | None = None
    p: float | None = None


@dataclass(frozen=True)
class Paired:
    """The comparison of two runs: tasks, averages, and the numbers of items that only one run contains."""

    first: str
    second: str
    tasks: tuple[TaskComparison, ...]
    averages: tuple[TaskComparison, ...]
    only_in_first: int
    only_in_second: int

    def _repr_markdown_(self) -> str:
        """The table, in notebooks."""
        return comparison_table(self)


def compare_records(
    first: Sequence[Record], second: Sequence[Record], names: tuple[str, str] = ("A", "B"), seed: int = 0
) -> Paired:
    """Pair the units of two runs by task and id.

    Raises:
        DataError: the runs share no scored item, or an id belongs to different questions in them.
    """
    _same_items(first, second)
    pairs = {}
    names_of = task_names(first)
    kinds = {name: kind for (_, kind), name in names_of.items()}
    kind_of = {(record.task, record.id): record.kind for record in first}
    rows: dict[str, tuple[list[Record], list[Record]]] = {task: ([], []) for task in kinds}
    for side, records in enumerate((first, second)):
        for record in records:  # an item has the kind that it has in the first run
            task = names_of.get((record.task, kind_of.get((record.task, record.id), record.kind)))
            if task is not None:
                rows[task][side].append(record)
    for task, sides in rows.items():
        scores = [units(records) for records in sides]
        shared = [name for name in scores[0] if name in scores[1]]
        if shared:
            pairs[task] = ([scores[0][name] for name in shared], [scores[1][name] for name in shared])
    if not pairs:
        raise DataError(f"{names[0]} and {names[1]} share no scored item; evaluate both on the same --data")
    tasks = tuple(_row(task, kinds[task], [pair], seed) for task, pair in pairs.items())
    averages = tuple(
        _row(f"{kind} average", kind, [pairs[task] for task in pairs if kinds[task] == kind], seed)
        for kind in KINDS
        if any(kinds[task] == kind for task in pairs)
    )
    ids = [{(record.task, record.id) for record in records} for records in (first, second)]
    return Paired(*names, tasks, averages, len(ids[0] - ids[1]), len(ids[1] - ids[0]))


def _row(name: str, kind: str, pairs: Sequence[tuple[list[float], list[float]]], seed: int) -> TaskComparison:
    differences = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairs]
    first, second = (score_interval([pair[side] for pair in pairs], seed) for side in (0, 1))
    total = sum(len(pair[0]) for pair in pairs)
    if len(pairs) > 1 or any(score not in (0, 1) for pair in pairs for side in pair for score in side):
        return TaskComparison(name, kind, first, second, bootstrap(differences, seed), total)
    lost, gained = (differences[0].count(sign) for sign in (-1, 1))
    return TaskComparison(
        name, kind, first, second, bootstrap(differences, seed), total, lost, gained, mcnemar(lost, gained)
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p-value (1947): a binomial test that the discordant units split evenly.

    >>> mcnemar(0, 5)
    0.0625
    """
    from scipy import stats

    total = only_first + only_second
    return float(stats.binomtest(only_first, total).pvalue) if total else 1.0


def _same_items(first: Sequence[Record], second: Sequence[Record]) -> None:
    keys: Mapping[tuple[str, str], str] = {(record.task, record.id): record.key for record in first}
    for record in second:
        known = keys.get((record.task, record.id))
        if known is not None and known != record.key:
            raise DataError(
                f"task {record.task!r}, id {record.id!r}: another question or another reference answer in the two "
                "runs; evaluate both on the same --data"
            )


def comparison_table(paired: Paired) -> str:
    """The comparison as a Markdown table: each task, then the averages, with paired differences."""
    first, second = paired.first, paired.second
    header = ["task", first, second, "difference", f"only {first} right", f"only {second} right", "McNemar p", "items"]
    lines = [markdown_line(header), "|" + "---|" * len(header)]
    lines += [markdown_line(_compared(row)) for row in (*paired.tasks, *paired.averages)]
    if paired.only_in_first or paired.only_in_second:
        lines.append(f"\n{paired.only_in_first} items are in {first} only, {paired.only_in_second} in {second} only.")
    return "\n".join(lines) + "\n"


def _compared(row: TaskComparison) -> list[str]:
    only = ["" if number is None else str(number) for number in (row.only_first, row.only_second)]
    p = "" if row.p is None else f"{row.p:.2g}"
    return [row.name, row.first.percent(), row.second.percent(), row.difference.signed(), *only, p, str(row.units)]
