"""Summaries and comparisons as Markdown."""

from __future__ import annotations

from vlmgraft.evaluation.intervals import Estimate
from vlmgraft.evaluation.paired import Paired, Row
from vlmgraft.evaluation.summary import Counts, Summary, TaskScore

DOUBTS = ("unscored", "not asked", "failed", "cut", "not read", "loops", "empty")
COLUMNS = ("task", "kind", "measure", "score", "items", *DOUBTS, "tokens")


def summary_table(summary: Summary) -> str:
    """Scores in percent with 95 % intervals, and beside them what casts doubt on them."""
    lines = [_line(list(COLUMNS)), "|" + "---|" * len(COLUMNS)]
    lines += [_line(_task(task)) for task in summary.tasks]
    for kind, estimate in summary.averages.items():
        if len([task for task in summary.tasks if task.kind == kind]) > 1:
            lines.append(_line([f"{kind} average", "", "mean over tasks", estimate.percent(), *[""] * 9]))
    notes = [f"- {task.task}: {others}" for task in summary.tasks if (others := _others(task))]
    if summary.duplicates:
        notes.append(f"- {summary.duplicates} ids stood twice; the later ones were renamed")
    shown = list(summary.faults.items())[:5]
    notes += [f"- {number} × {' '.join(fault.split())}" for fault, number in shown]
    if len(summary.faults) > len(shown):
        notes.append(f"- and {len(summary.faults) - len(shown)} other faults, in records.jsonl")
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def comparison_table(found: Paired) -> str:
    """The table the papers print: each task, then the averages, with the paired difference."""
    first, second = found.first, found.second
    header = ["task", first, second, "difference", f"only {first} right", f"only {second} right", "McNemar p", "items"]
    lines = [_line(header), "|" + "---|" * len(header)]
    lines += [_line(_compared(row)) for row in (*found.tasks, *found.averages)]
    if found.only_in_first or found.only_in_second:
        lines.append(f"\n{found.only_in_first} items are in {first} only, {found.only_in_second} in {second} only.")
    return "\n".join(lines) + "\n"


def _task(task: TaskScore) -> list[str]:
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


def _compared(row: Row) -> list[str]:
    only = ["" if number is None else str(number) for number in (row.only_first, row.only_second)]
    p = "" if row.p is None else f"{row.p:.2g}"
    return [row.name, row.first.percent(), row.second.percent(), signed(row.difference), *only, p, str(row.units)]


def signed(difference: Estimate) -> str:
    """Such as "+2.1 [-0.4, +4.6]", in points."""
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |"
