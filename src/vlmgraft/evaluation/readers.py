"""From rows to items: a column map or a preset says which column holds what; a bad row becomes an item with a fault."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vlmgraft.data.chat import MARK
from vlmgraft.data.choices import Choices, missing, number_text, read_choices, refuse_counts_from_one
from vlmgraft.data.images import ImageSource, image_source
from vlmgraft.data.questions import UNSEEN, check_columns
from vlmgraft.data.sources import Row, read_rows, refuse_ambiguous, registered_source
from vlmgraft.errors import DataError
from vlmgraft.evaluation.answers.text import storable
from vlmgraft.evaluation.items import Item, Kind, Suite, circular, unique
from vlmgraft.evaluation.metrics import METRICS
from vlmgraft.evaluation.presets import PRESETS, Columns, Preset

LOCAL = Preset("", "", "other", Columns(task=("task",)), suffix="", max_new_tokens=1024)
KINDS: tuple[Kind, ...] = ("reasoning", "perception", "other")
SINGULAR = {"image": "images", "answer": "answers"}
"""Names that calibration files use, as fields of `Columns`."""


def load_suite(
    data: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    turn_options: bool = False,
    task: str = "",
) -> Suite:
    """The items of `data`: a file, folder or data set's id; a preset's name; PRESET:SOURCE, a copy in its layout; or a
    registered source.

    Args:
        columns: field of `Columns` → column name (or several, separated by "+"), overriding the preset's.
        limit: number of rows, from the first; a registered source divides it among its tasks.
        turn_options: ask every rotation of lettered choices (circular evaluation).
        task: name of the suite, and of the task of rows that name none; default: the preset's, or the file's stem.
    Raises:
        DataError: the source cannot be read, no row has the question's column, a column map names an unknown field, a
            folder has a preset's name, or the answers number the choices from 1.
    """
    name, _, source = str(data).partition(":")
    preset = PRESETS.get(name.lower())
    if preset is None:
        preset, name, source = LOCAL, Path(data).stem if Path(data).exists() else str(data), str(data)
    elif not source:
        remedy = f"write ./{data} for the folder, {data}:{data} for it in the benchmark's layout"
        refuse_ambiguous(data, f"the benchmark {preset.source}", remedy)
        source, split, config = preset.source, split or preset.split, config or preset.config
    name = task or name
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
    read = [(_choices(row, preset)[0], _single(_first(row, preset.columns.answers))) for row in rows[:limit]]
    refuse_counts_from_one(read, source)
    items, renamed = unique([_item(row, at, name, preset, folder) for at, row in enumerate(rows[:limit])])
    if turn_options:
        items = tuple(circular(items))
    return Suite(name, items, preset.suffix, preset.max_new_tokens, renamed)


def distinct_tasks(sources: Sequence[Any]) -> list[str]:
    """For every source the `task` that keeps it apart from another file of the same stem, or another copy in the layout
    of the same preset: its name with as many folders as that takes; "" where its default name is its own."""
    files = [_file_of(source) for source in sources]
    result = []
    for found in files:
        alike = {path for each in files if each and found and each[0] == found[0] for path in [each[1]]}
        if found is None or len(alike) < 2:
            result.append("")
            continue
        paths = sorted(alike)
        names = short_names(paths)
        bare = [name.removesuffix(path.suffix) for path, name in zip(paths, names, strict=True)]
        name = (bare if len(set(bare)) == len(paths) else names)[paths.index(found[1])]
        result.append(name if found[0] == found[1].stem else f"{found[0]}:{name}")
    return result


def _file_of(source: Any) -> tuple[str, Path] | None:
    """(default name of the task, file or folder) of a source on disk, else None."""
    preset, _, path = str(source).partition(":")
    if isinstance(source, str | Path) and preset.lower() in PRESETS:
        return (preset, Path(path)) if path else None
    return (Path(source).stem, Path(source)) if isinstance(source, str | Path) and Path(source).exists() else None


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names of paths that differ where the paths do, with as many parent folders as that needs."""
    short = [path.name for path in paths]
    for count in range(1, 1 + max(len(path.parts) for path in paths)):
        short = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(short)) == len(set(paths)):
            break
    return short


def mapped(columns: Columns, changes: Mapping[str, str]) -> Columns:
    """Columns with some fields replaced; raises DataError for an unknown field, or one that is given twice."""
    known = [field.name for field in fields(Columns)]
    given: dict[str, tuple[str, ...]] = {}
    for name, value in changes.items():
        field = SINGULAR.get(name, name)
        if field not in known or field in given:
            why = "names twice" if field in given else "unknown field"
            raise DataError(f"column map: {why} {name!r}; it has {', '.join(known)}")
        if not isinstance(value, str) or not value:
            raise DataError(f"column map: {name} is {value!r:.60}; write one column's name, or several joined by '+'")
        given[field] = tuple(value.split("+"))
    return replace(columns, **given)


def _item(row: Row, at: int, task: str, preset: Preset, folder: Path | None) -> Item:
    columns = preset.columns
    question = _first(row, columns.question)
    images, fault = _images(row, columns.images, folder)
    if unseen := next((column for column in UNSEEN if row.get(column)), None):
        fault = f'column "{unseen}" is not shown; only images are'
    if not isinstance(question, str):
        fault = "the question is empty" if question is None else f"the question is no text: {str(question)[:60]!r}"
    choices, unread = _choices(row, preset)
    answers, unclear = _answers(_first(row, columns.answers), choices)
    kind, unknown = _kind(_first(row, columns.kind), preset)
    places = sum(text.count(MARK) for text in (str(question), *choices.texts))
    misplaced = f"{places} places for images, but {len(images)} images" if places not in (0, len(images)) else ""
    category = _first(row, columns.category)
    labels = category if isinstance(category, list) else [] if category is None else [category]
    return Item(
        id=_joined(row, columns.id) or str(at),
        question=storable(question) if isinstance(question, str) else "",
        images=images,
        answers=answers,
        choices=tuple(map(storable, choices.texts)),
        task=_joined(row, columns.task) or task,
        kind=kind,
        metric=_metric(row, preset),
        precision=_precision(_first(row, columns.precision)),
        category=", ".join(map(str, labels)),
        group=_joined(row, columns.group),
        part=str(_first(row, columns.part) or ""),
        pairing=preset.pairing,
        fault=fault or unread or unclear or unknown or misplaced,
    )


def _first(row: Row, names: Sequence[str]) -> Any:
    """The first of the columns that has a value; None when none has."""
    return next((row[name] for name in names if not missing(row.get(name))), None)


def _joined(row: Row, names: Sequence[str]) -> str:
    """The values of all columns that the row has, joined by "/"; a name that ends in "|" also ends a group."""
    joined = ""
    for name in names:
        value = row.get(name.rstrip("|"))
        if not missing(value):
            joined += ("" if not joined or joined.endswith("|") else "/") + storable(str(value))
        joined += "|" if name.endswith("|") else ""
    return joined


def _answers(value: Any, choices: Choices) -> tuple[tuple[str, ...], str]:
    """References from one value, a list of values or of objects with "answer" (VizWiz), an object of texts (SQuAD) or
    of a value and its aliases (TriviaQA), or a list of texts in text form (MMMU), without blank ones; and their
    fault."""
    if isinstance(value, bool):
        words = ("yes", "true") if value else ("no", "false")
        return (next((choice for choice in choices.texts if choice.lower() in words), str(value)),), ""
    answers: list[str] = []
    for each in value if isinstance(value, list | tuple) else _listed(value) or [value]:
        for one in _named_answers(each) if isinstance(each, Mapping) else [each]:
            if isinstance(one, Mapping | list | tuple | bytes):
                return (), f"an answer is no text: {one!r:.60}"
            if missing(one) or not str(one).strip():
                continue
            try:
                answers.append(choices.letter_of(one) or storable(number_text(one)))
            except DataError as error:
                return (), str(error)
    return tuple(answers), ""


def _named_answers(value: Mapping[str, Any]) -> list[Any]:
    named = [value[key] for key in ("answer", "text", "value", "aliases") if key in value] or [value]
    return [one for each in named for one in (each if isinstance(each, list | tuple) else [each])]


def _single(value: Any) -> Any:
    """The only value of a list of one."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _listed(value: Any) -> list[str] | None:
    """Parse a text such as "['7', 'seven']" as a list; None for other texts, including lists of numbers."""
    if not isinstance(value, str) or not value.lstrip().startswith(("['", '["')):
        return None
    try:
        listed = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return listed if isinstance(listed, list) and all(isinstance(each, str) for each in listed) else None


def _choices(row: Row, preset: Preset) -> tuple[Choices, str]:
    """The choices of a row, and why they cannot be shown, or ""."""
    column = next((name for name in preset.columns.choices if not missing(row.get(name))), "")
    try:
        choices = read_choices(row.get(column))
    except DataError as error:
        return Choices(), f'column "{column}": {error}'
    return choices, f'column "{column}": only one choice' if sum(map(bool, choices.texts)) == 1 else ""


def _kind(value: Any, preset: Preset) -> tuple[Kind, str]:
    """The kind of an item, and the fault of an unknown one in a file of the user's own."""
    kind = next((kind for kind in KINDS if kind == str(value).strip().lower()), preset.kind)
    unknown = value is not None and not preset.source and str(value).strip().lower() not in KINDS
    return kind, f"kind {value!r:.40} is none of {', '.join(KINDS)}; ignore it by kind=none" if unknown else ""


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
            if missing(each):
                continue
            try:
                source = image_source(each, folder)
            except DataError as error:
                return tuple(sources), str(error)
            if source is None:
                return tuple(sources), f"no picture: {str(each)[:60]!r}"
            sources.append(source)
    return tuple(sources), ""


def _pictures(row: Row, names: Sequence[str]) -> list[Any]:
    for name in names:
        starred = [column for column in row if name.endswith("*") and column.startswith(name[:-1])]
        pictures = [row[column] for column in sorted(starred) or [name] if not missing(row.get(column))]
        if pictures:
            return pictures
    return []
