"""Folders of `vlmgraft evaluate` as rows of a report: a point per model, and the same questions side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from vlmgraft.errors import DamagedError
from vlmgraft.storage.jsonl import read_json, read_rows

Rows = list[dict[str, Any]]
SHOWN = 24
QUESTION_LENGTH = 600


@dataclass(frozen=True)
class Evaluation:
    """One folder: the model's name, the averages by kind, and a row per item."""

    folder: Path
    model: str
    averages: dict[str, Any]
    records: Rows


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation in a folder; None when it holds something else under these names."""
    records, run = folder / "records.jsonl", folder / "run.json"
    averages = read_json(folder / "summary.json").get("averages") if records.is_file() else None
    if not isinstance(averages, dict):
        return None
    if not all(isinstance(average, dict) and "mean" in average for average in averages.values()):
        raise DamagedError(folder / "summary.json", f"averages {averages!r:.80}")
    asked = read_json(run) if run.is_file() else {}
    name = Path(str(asked.get("model", folder.name))).name
    return Evaluation(folder, name, averages, list(read_rows(records)))


def evaluation_points(evaluations: Sequence[Evaluation]) -> Rows:
    """A point for every model that has both kinds of tasks."""
    return [
        {"method": each.model, "setting": "", "order": 0, "kl": None}
        | {kind: each.averages[kind] for kind in ("reasoning", "perception")}
        for each in evaluations
        if {"reasoning", "perception"} <= set(each.averages)
    ]


def side_by_side(evaluations: Sequence[Evaluation]) -> Rows:
    """The first questions of every task that all models were asked, as `answers.jsonl` has them, without images."""
    if len(evaluations) < 2:
        return []
    scored = [
        {(row["id"], row["key"]): row for row in each.records if row.get("score") is not None} for each in evaluations
    ]
    tasks: dict[str, Rows] = {}
    for key, row in scored[0].items():
        if all(key in records for records in scored):
            answers = [
                {"model": each.model, "said": records[key]["output"], "right": records[key]["score"] == 1}
                for each, records in zip(evaluations, scored, strict=True)
            ]
            shown = {"task": row["task"], "kind": row["kind"], "question": row["prompt"][-QUESTION_LENGTH:]}
            shown |= {"expected": ", ".join(row["expected"]), "image": None, "answers": answers}
            tasks.setdefault(row["task"], []).append(shown)
    turns = chain.from_iterable(zip_longest(*tasks.values()))
    return [row for row in turns if row is not None][:SHOWN]
