"""From rows to items: a column map or a preset says which column holds what; a bad row becomes an item with a fault."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vlmgraft.data.images import ImageSource, image_source
from vlmgraft.data.questions import MOST_CHOICES, UNSEEN, check_columns
from vlmgraft.data.sources import Row, read_rows, refuse_ambiguous, registered_source
from vlmgraft.errors import DataError
from vlmgraft.evaluation.answers.options import lettered, letters
from vlmgraft.evaluation.answers.text import storable
from vlmgraft.evaluation.items import Item, Suite, circular, unique
from vlmgraft.evaluation.metrics import METRICS
from vlmgraft.evaluation.presets import PRESETS, Columns, Preset

LOCAL = Preset("", "", "other", suffix="", max_new_tokens=1024)


def load_suite(
    data: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    turn_options: bool = False,
) -> Suite:
    """The items of `data`: a file, folder or data set's id; a preset's name; PRESET:SOURCE, a copy in its layout; or a
    registered source.

    Args:
        columns: field of `Columns` → column name (or several, separated by "+"), overriding the preset's.
        limit: number of rows, from the first; a registered source divides it among its tasks.
        turn_options: ask every rotation of lettered choices (circular evaluation).
    Raises:
        DataError: the source cannot be read, no row has the question's column, or a column map names an unknown field,
            or a folder has a preset's name.
    """
    name, _, source = str(data).partition(":")
    preset = PRESETS.get(name.lower())
    if preset is None:
        preset, name, source = LOCAL, Path(data).stem if Path(data).exists() else str(data), str(data)
    elif not source:
        remedy = f"write ./{data} for the folder, {data}:{data} for it in the benchmark's layout"
        refuse_ambiguous(data, f"the benchmark {preset.source}", remedy)
        source, split, config = preset.source, split or preset.split, config or preset.config
    preset = replace(preset, columns=mapped(preset.columns, columns or {}))
    registered = registered_source(source)
    if registered and registered[0].max_new_tokens:
        preset = replace(preset, max_new_tokens=registered[0].max_new_tokens)
    rows, folder = read_rows(source, split=split, config=config, count=limit)
    if not rows:
        raise DataError(f"{source}: holds no row")
    if not any(column in row for row in rows for column in preset.columns.question):
        raise DataError(
            f"{source}: no column {' or '.join(preset.columns.question)}; it has {', '.join(map(str, rows[0]))}. "
            "Name the columns, such as --column question=query"
        )
    seen = {name for row in rows for name in row}
    for field, value in (columns or {}).items():
        if not any(name.endswith("*") or name.rstrip("|") in seen for name in value.split("+")):
            check_columns({field: value}, seen, source)
    items, renamed = unique([_item(row, at, name, preset, folder) for at, row in enumerate(rows[:limit])])
    if turn_options:
        items = tuple(circular(items))
    return Suite(name, items, preset.suffix, preset.max_new_tokens, renamed)


def mapped(columns: Columns, changes: Mapping[str, str]) -> Columns:
    """Columns with some fields replaced; raises DataError for an unknown field."""
    known = [field.name for field in fields(Columns)]
    for name in changes:
        if name not in known:
            raise DataError(f"column map: unknown field {name!r}; it has {', '.join(known)}")
    return replace(columns, **{name: tuple(value.split("+")) for name, value in changes.items()})


def _item(row: Row, at: int, task: str, preset: Preset, folder: Path | None) -> Item:
    columns = preset.columns
    question = _first(row, columns.question)
    images, fault = _images(row, columns.images, folder)
    if unseen := next((column for column in UNSEEN if row.get(column)), None):
        fault = f'column "{unseen}" is not shown; only images are'
    if not isinstance(question, str):
        fault = "the question is empty" if question is None else f"the question is no text: {str(question)[:60]!r}"
    choices = _choices(_first(row, columns.choices))
    if len(choices) > MOST_CHOICES:
        fault = f"{len(choices)} choices; at most {MOST_CHOICES} can be lettered"
    category = _first(row, columns.category)
    labels = category if isinstance(category, list) else [] if category is None else [category]
    return Item(
        id=_joined(row, columns.id) or str(at),
        question=storable(question) if isinstance(question, str) else "",
        images=images,
        answers=_answers(_first(row, columns.answers), choices),
        choices=choices,
        task=storable(str(row["task"])) if not preset.source and row.get("task") else task,
        kind=_kind(_first(row, columns.kind), preset),
        metric=_metric(row, preset),
        precision=_precision(_first(row, columns.precision)),
        category=", ".join(map(str, labels)),
        group=_joined(row, columns.group),
        part=str(_first(row, columns.part) or ""),
        pairing=preset.pairing,
        fault=fault,
    )


def _first(row: Row, names: Sequence[str]) -> Any:
    """The first of the columns that has a value; None when none has."""
    return next((row[name] for name in names if row.get(name) not in (None, "", [])), None)


def _joined(row: Row, names: Sequence[str]) -> str:
    """The values of all columns that the row has, joined by "/"; a name that ends in "|" also ends a group."""
    joined = ""
    for name in names:
        value = row.get(name.rstrip("|"))
        if value is not None:
            joined += ("" if not joined or joined.endswith("|") else "/") + storable(str(value))
        joined += "|" if name.endswith("|") else ""
    return joined


def _answers(value: Any, choices: Sequence[str]) -> tuple[str, ...]:
    """References from one value, a list of values or of objects with "answer" (VizWiz), or a list of texts in text form
    (MMMU), without blank ones. An integer that is not itself a choice is an index into the choices, from 0."""
    listed = value if isinstance(value, list | tuple) else _listed(value) or [value]
    values = [each.get("answer") if isinstance(each, dict) else each for each in listed]
    answers = tuple(_number(each) for each in values if each is not None and str(each).strip())
    if isinstance(value, bool):
        words = ("yes", "true") if value else ("no", "false")
        return (next((choice for choice in choices if choice.lower() in words), str(value)),)
    if choices and isinstance(value, int) and str(value) not in choices and 0 <= value < len(choices):
        return (letters(len(choices))[value],)
    return answers


def _listed(value: Any) -> list[str] | None:
    """Parse a text such as "['7', 'seven']" as a list; None for other texts, including lists of numbers."""
    if not isinstance(value, str) or not value.lstrip().startswith(("['", '["')):
        return None
    try:
        listed = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return listed if isinstance(listed, list) and all(isinstance(each, str) for each in listed) else None


def _number(value: Any) -> str:
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return storable(str(int(value) if whole else value))


def _choices(value: Any) -> tuple[str, ...]:
    """Choices from a list, a list in text form (MMMU), or lettered texts in one line (WeMath: "A. 3; B. 4")."""
    if isinstance(value, str):
        value = _listed(value) or lettered(value)
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return ()
    return tuple(storable(str(choice)) for choice in value if choice is not None) if len(value) > 1 else ()


def _kind(value: Any, preset: Preset) -> Any:
    return value if value in ("reasoning", "perception", "other") else preset.kind


def _metric(row: Row, preset: Preset) -> str:
    named = None if preset.source else row.get("metric")
    if preset.metric == "contains" and row.get("dataset") == "HME100k":
        return "contains_unspaced"
    return str(named) if named in METRICS else preset.metric


def _precision(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and 0 < value <= 12 else None


def _images(row: Row, names: Sequence[str], folder: Path | None) -> tuple[tuple[ImageSource, ...], str]:
    """The images of a row, and the fault of the first invalid one, or ""."""
    sources: list[ImageSource] = []
    for value in _pictures(row, names):
        for each in value if isinstance(value, list | tuple) else [value]:
            if each is None or each == "":
                continue
            source = image_source(each, folder)
            if source is None:
                return tuple(sources), f"no picture: {str(each)[:60]!r}"
            sources.append(source)
    return tuple(sources), ""


def _pictures(row: Row, names: Sequence[str]) -> list[Any]:
    for name in names:
        starred = [column for column in row if name.endswith("*") and column.startswith(name[:-1])]
        pictures = [row[column] for column in sorted(starred) or [name] if row.get(column) not in (None, "", [])]
        if pictures:
            return pictures
    return []
