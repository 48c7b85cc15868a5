"""The data of a report: rows that commands left in run folders, found by file name. Data first; no torch.

| file | written by |
|---|---|
| results.jsonl, sweep.jsonl | demo, sweep: points of perception, reasoning and KL |
| choose.jsonl | choose: the VLM and the rules that were tested, the same figures |
| knockout.jsonl, ranks.jsonl | knockout, ranks |
| distances.jsonl, spectra.jsonl, inspection.json | inspect --distances --out |
| gates.json, gates.safetensors, training.jsonl | gates, merge --workdir, demo |
| receipt.json, recipe.yaml | merge |
| answers.jsonl | `python -m experiments.lab report`: the same questions to several models |
| summary.json with records.jsonl and run.json | evaluate |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from vlmgraft.errors import DamagedError, InputError
from vlmgraft.evaluation.records import RECORDS, Record, load_records
from vlmgraft.report import schemas
from vlmgraft.report.gate_folder import GatedRun, read_gates
from vlmgraft.storage.jsonl import json_object, read_json, read_rows
from vlmgraft.storage.listed import listed
from vlmgraft.storage.portable import nameless

Rows = list[dict[str, Any]]
SHOWN = 24
QUESTION_LENGTH = 600


@dataclass(frozen=True)
class Evaluation:
    """The evaluation in one folder: the model's name, the averages by kind, and a record per item."""

    folder: Path
    model: str
    averages: dict[str, Any]
    records: list[Record]


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation in a folder; None if its files with these names hold something else."""
    summary, run = folder / "summary.json", folder / "run.json"
    if not (folder / RECORDS).is_file() or not isinstance(read_json(summary).get("averages"), dict):
        return None
    run_settings = read_json(run) if run.is_file() else {}
    name = Path(str(run_settings.get("model", folder.name))).name
    return Evaluation(folder, name, read_json(summary, TypeAdapter(schemas.Averages))["averages"], load_records(folder))


def evaluation_points(evaluations: Sequence[Evaluation]) -> Rows:
    """A point for every model that has both kinds of tasks."""
    return [
        {"method": each.model, "setting": "", "order": 0, "kl": None}
        | {kind: each.averages[kind] for kind in ("reasoning", "perception")}
        for each in evaluations
        if {"reasoning", "perception"} <= set(each.averages)
    ]


def side_by_side(evaluations: Sequence[Evaluation]) -> Rows:
    """The first questions per task that all models were asked, in the format of `answers.jsonl`, without images."""
    if len(evaluations) < 2:
        return []
    scored = [
        {(record.id, record.key): record for record in each.records if record.score is not None} for each in evaluations
    ]
    tasks: dict[str, Rows] = {}
    for key, first in scored[0].items():
        if all(key in records for records in scored):
            answers = [
                {"model": each.model, "said": records[key].output, "right": records[key].score == 1}
                for each, records in zip(evaluations, scored, strict=True)
            ]
            shown: dict[str, Any] = {
                "task": first.task,
                "kind": first.kind,
                "question": first.prompt[-QUESTION_LENGTH:],
            }
            shown |= {"expected": ", ".join(first.expected), "image": None, "answers": answers}
            tasks.setdefault(first.task, []).append(shown)
    turns = chain.from_iterable(zip_longest(*tasks.values()))
    return [row for row in turns if row is not None][:SHOWN]


DEPTH = 5


@dataclass(frozen=True)
class Run:
    """The rows of one file and its folder."""

    folder: Path
    rows: Rows


@dataclass(frozen=True)
class Document:
    """A receipt (parsed) or a recipe (text), with its folder."""

    folder: Path
    content: Any


@dataclass
class Collected:
    """All data found, in the order of the folders."""

    points: list[Run] = field(default_factory=list)
    knockouts: list[Run] = field(default_factory=list)
    ranks: list[Run] = field(default_factory=list)
    distances: list[Run] = field(default_factory=list)
    spectra: list[Run] = field(default_factory=list)
    inspections: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    gates: list[GatedRun] = field(default_factory=list)
    receipts: list[Document] = field(default_factory=list)
    recipes: list[Document] = field(default_factory=list)
    answers: list[Run] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)


def collect(folders: Sequence[str | Path]) -> Collected:
    """Read every known file in the folders, five levels deep; hidden folders and factor stores are skipped.

    Raises:
        InputError: no folder is given, one is missing, or none of them holds a file of a run. CheckpointError:
            unreadable gates. DamagedError, DataError: another file was not written by a command.
    """
    runs = Collected()
    if not (folders := listed(folders)):
        raise InputError("report: no folder is given; give folders that vlmgraft wrote")
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give folders that vlmgraft wrote")
        for path in _files(folder, DEPTH):
            _READERS[path.name](runs, path)
    parent = runs.evaluations[0].folder.parent if runs.evaluations else Path()
    for compared, rows in ((runs.points, evaluation_points), (runs.answers, side_by_side)):
        if made := rows(runs.evaluations):  # one chart and one list of answers for all models
            compared.append(Run(parent, made))
    if not any(vars(runs).values()):
        names = ", ".join(sorted(_READERS))
        raise InputError(f"{', '.join(map(str, folders))}: holds none of the files a report is made of ({names})")
    return runs


def _files(folder: Path, depth: int) -> Iterator[Path]:
    entries = sorted(folder.iterdir())
    yield from (path for path in entries if path.is_file() and path.name in _READERS)
    if depth and not (folder / "factors.json").is_file():
        for path in entries:
            if path.is_dir() and not path.name.startswith("."):
                yield from _files(path, depth - 1)


def _rows_into(kind: str, row: Any) -> Callable[[Collected, Path], None]:
    adapter: TypeAdapter[Any] = TypeAdapter(row)

    def read(runs: Collected, path: Path) -> None:
        rows = nameless(list(read_rows(path, adapter)))
        if rows:
            getattr(runs, kind).append(Run(path.parent, rows))

    return read


def _choice(runs: Collected, path: Path) -> None:
    """Collect the measured rules of `choose`; the others were dropped before the test, and have no accuracies."""
    rows = [row for row in nameless(list(read_rows(path, TypeAdapter(schemas.Contender)))) if row.get("reasoning")]
    if rows:
        runs.points.append(Run(path.parent, rows))


def _inspection(runs: Collected, path: Path) -> None:
    runs.inspections.append((path.parent, nameless(read_json(path, TypeAdapter(schemas.InspectionFile)))))


def _receipt(runs: Collected, path: Path) -> None:
    """Collect a merge's receipt; receipts of stores, adapters and tuned folders only list digests and are skipped."""
    text = path.read_bytes()
    if "method" in json_object(text, path):
        runs.receipts.append(
            Document(path.parent, nameless(json_object(text, path, TypeAdapter(schemas.MergeReceipt))))
        )


def _recipe(runs: Collected, path: Path) -> None:
    try:
        text = nameless(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DamagedError(path, error) from error
    if text not in [recipe.content for recipe in runs.recipes]:
        runs.recipes.append(Document(path.parent, text))


def _summary(runs: Collected, path: Path) -> None:
    if evaluation := read_evaluation(path.parent):
        runs.evaluations.append(evaluation)


_READERS: Mapping[str, Callable[[Collected, Path], None]] = {
    "results.jsonl": _rows_into("points", schemas.PointRow),
    "sweep.jsonl": _rows_into("points", schemas.PointRow),
    "choose.jsonl": _choice,
    "knockout.jsonl": _rows_into("knockouts", schemas.Cell),
    "ranks.jsonl": _rows_into("ranks", schemas.Band),
    "distances.jsonl": _rows_into("distances", schemas.DistanceRow),
    "spectra.jsonl": _rows_into("spectra", schemas.SpectrumRow),
    "inspection.json": _inspection,
    "receipt.json": _receipt,
    "recipe.yaml": _recipe,
    "gates.json": lambda runs, path: runs.gates.append(read_gates(path.parent)),
    "answers.jsonl": _rows_into("answers", schemas.Answered),
    "summary.json": _summary,
}
