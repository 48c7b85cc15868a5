"""Rows from files and data sets: JSON lines, JSON, parquet, folders and ids of `datasets`, and registered sources.

Images inside parquet files and data sets are read only when they are needed. An installed package registers a source by
an entry point of the group `vlmgraft.data` that names a `RegisteredSource`:

    [project.entry-points."vlmgraft.data"]
    lab = "vlmgraft.lab.exam:SOURCE"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.files import open_regular
from vlmgraft.data.lines import json_lines, parse
from vlmgraft.errors import CheckpointError, DataError
from vlmgraft.storage.limits import MAX_DATA_JSON, MAX_LINE, MAX_PARQUET_RATIO

Row = Mapping[str, Any]
READABLE = ".jsonl, .json, .parquet, a folder of parquet files or one that `datasets` saved, or a data set's id"
ENTRY_POINTS = "vlmgraft.data"


@dataclass(frozen=True)
class RegisteredSource:
    """Rows that an installed package generates, addressed as NAME or NAME:ARGUMENT.

    draw: (argument, split, count) → rows with the columns of a question file; `argument` is "" if none is given,
    `count` is the number of rows, None for the source's default. splits: evaluations use the first; analyses take
    prompts to average over from "calibration", and prompts for the KL from "divergence". max_new_tokens: length that
    answers need, None if unknown. batch_size: questions per batch.
    """

    draw: Callable[[str, str, int | None], list[Row]]
    splits: tuple[str, ...]
    max_new_tokens: int | None = None
    batch_size: int = 16

    def rows(self, argument: str = "", split: str | None = None, count: int | None = None) -> list[Row]:
        """The rows of a split, by default of the first; raises DataError for an unknown one."""
        if split is not None and split not in self.splits:
            raise DataError(f"split {split!r}: the source has the splits {', '.join(self.splits)}; name one of them")
        return self.draw(argument, split or self.splits[0], count)


def registered_source(data: str | Path) -> tuple[RegisteredSource, str] | None:
    """The registered source that `data` names, with its argument; None for files and other sources.

    Raises:
        DataError: two packages register the name, a folder of this name holds data, or the source cannot be loaded.
    """
    name, _, argument = str(data).partition(":")
    points = entry_points(group=ENTRY_POINTS, name=name)
    if not points or Path(data).is_file():
        return None
    refuse_ambiguous(data, "a registered source", f"write ./{name} for the folder")
    if len(targets := {point.value for point in points}) > 1:
        raise DataError(f"{data}: registered as {' and '.join(sorted(targets))}; uninstall one of the packages")
    try:
        source = next(iter(points)).load()
    except (ImportError, AttributeError) as error:
        raise DataError(f"{data}: the registered source {targets.pop()} cannot be loaded ({error})") from error
    if not isinstance(source, RegisteredSource):
        raise DataError(f"{data}: {targets.pop()} is no RegisteredSource but {type(source).__name__}")
    return source, argument


def refuse_ambiguous(name: str | Path, meaning: str, remedy: str) -> None:
    """Raise DataError if a name that means something else is also that of a folder of data here."""
    folder = Path(name)
    marks = ("*.parquet", "dataset_info.json", "dataset_dict.json")
    if folder.is_dir() and any(any(folder.glob(mark)) for mark in marks):
        raise DataError(f"{name}: is {meaning}, and a folder of this name holds data; {remedy}, {name}: for the other")


def read_rows(
    source: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    errors: str = "replace",
    count: int | None = None,
) -> tuple[list[Row], Path | None]:
    """The rows of a source, and the folder that image paths are relative to (None for the hub).

    JSON files hold a list of objects, an object of objects (their keys become "id"), one object, or JSON lines.
    errors: handling of UTF-8 errors in JSON lines. count: rows that a registered source draws. Raises DataError.
    """
    if not str(source).strip():
        raise DataError(f"the name of the data is empty; give {READABLE}")
    if registered := registered_source(source):
        return registered[0].rows(registered[1], split, count), None
    path = Path(source)
    if path.suffix in (".jsonl", ".json") and (path.is_file() or not _could_be_id(str(source))):
        if not path.is_file():
            raise DataError(f"{path}: no such file; give {READABLE}")
        return ([row for _, row in json_lines(path, errors)] if path.suffix == ".jsonl" else _json(path)), path.parent
    if path.is_dir() or path.suffix == ".parquet":
        return _local_dataset(path, split), path if path.is_dir() else path.parent
    if path.exists() or not _could_be_id(str(source)):
        raise DataError(f"{source}: cannot be read; give {READABLE}")
    return _hub_dataset(str(source), split, config), None


def split_named(source: str) -> tuple[str, str | None]:
    """(source, split) of NAME:SPLIT. None as split for files, folders and registered sources (NAME:ARGUMENT)."""
    name, _, split = source.partition(":")
    whole = not split or Path(source).exists() or registered_source(source) is not None
    return (source, None) if whole else (name, split)


def _could_be_id(source: str) -> bool:
    return (
        source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not source.endswith((".jsonl", ".json"))
    )


def _json(path: Path) -> list[Row]:
    if path.stat().st_size > MAX_DATA_JSON:
        raise DataError(f"{path}: has more than {MAX_DATA_JSON:,} bytes; write JSON lines, which are read one by one")
    try:
        with open_regular(path) as file:
            raw = file.read()
        data = parse(raw)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give {READABLE}") from None
    except CheckpointError as error:
        raise DataError(str(error)) from None
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data") and raw.lstrip().startswith(b"{"):
            return [row for _, row in json_lines(path)]
        raise DataError(f"{path}: not JSON ({error!s:.200}); write one JSON object per line as .jsonl") from error
    if isinstance(data, dict):
        of_rows = data and all(isinstance(row, dict) for row in data.values())
        data = [{"id": name, **row} for name, row in data.items()] if of_rows else [data]
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise DataError(f"{path}: is JSON, but must be a list of objects, or an object of objects")
    return data


def _local_dataset(path: Path, split: str | None) -> list[Row]:
    from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
    from datasets.exceptions import DatasetsError

    if path.is_dir() and not list(path.glob("*.parquet")):
        try:
            data = load_from_disk(str(path))
        except (FileNotFoundError, ValueError, OSError) as error:
            raise DataError(f"{path}: holds no data set ({error}); give {READABLE}") from error
        if isinstance(data, DatasetDict):
            data = _split_of(data, split, path)
        return _lazy(data)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if split and path.is_dir():
        files = [file for file in files if file.name.startswith(split)] or files
    if not files or not files[0].is_file():
        raise DataError(f"{path}: no such file; give {READABLE}")
    files = [file for file in files if _checked_rows(file)]  # `datasets` refuses a file without rows
    try:
        return _lazy(concatenate_datasets([Dataset.from_parquet(str(file)) for file in files])) if files else []
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, MemoryError, DatasetsError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be read ({str(cause)[:200]}); download it, or write it again") from error


def _checked_rows(file: Path) -> int:
    """The number of rows in a parquet file. Raises DataError for a column of maps, which `datasets` cannot read, and if
    the footer shows a decompression bomb: few bytes that become gigabytes."""
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    try:
        metadata = parquet.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
    except (OSError, ArrowException) as error:
        raise DataError(f"{file}: no parquet file ({str(error)[:200]}); download it again") from error
    if maps := [field.name for field in schema if "map<" in str(field.type)]:
        raise DataError(f"{file}: column {maps[0]!r} holds maps, which are not read; write them as structs, or drop it")
    for number, group in enumerate(map(metadata.row_group, range(metadata.num_row_groups))):
        for column in map(group.column, range(group.num_columns)):
            size, packed = column.total_uncompressed_size, column.total_compressed_size
            many = size > MAX_LINE * max(1, group.num_rows) or (size > MAX_LINE and size > MAX_PARQUET_RATIO * packed)
            if not many and column.has_dictionary_page and size * column.num_values > MAX_DATA_JSON:
                size = _size_of_values(file, number, column.path_in_schema)
                many = size > MAX_DATA_JSON and size > MAX_PARQUET_RATIO * packed
            if many:
                raise DataError(
                    f"{file}: column {column.path_in_schema!r:.120} unpacks {packed:,} bytes to {size:,} in "
                    f"{group.num_rows} rows; at most {MAX_LINE:,} a row and {MAX_PARQUET_RATIO} times; drop the column"
                )
    return int(metadata.num_rows)


def _size_of_values(file: Path, group: int, column: str) -> int:
    """Bytes of a column's texts after dictionary decoding, computed from the dictionary and its indices."""
    from pyarrow import ArrowException, compute, parquet, types

    try:
        rows = parquet.ParquetFile(file, read_dictionary=[column]).read_row_group(group, columns=[column]).column(0)
        while types.is_struct(rows.type) or types.is_list(rows.type) or types.is_large_list(rows.type):
            rows = compute.struct_field(rows, [0]) if types.is_struct(rows.type) else compute.list_flatten(rows)
        if not types.is_dictionary(rows.type):  # numbers
            return int(rows.nbytes)
        sizes = (compute.binary_length(chunk.dictionary).take(chunk.indices) for chunk in rows.chunks)
        return sum(compute.sum(part).as_py() or 0 for part in sizes)
    except (OSError, ArrowException) as error:
        raise DataError(f"{file}: no parquet file ({str(error)[:200]}); download it again") from error


def _hub_dataset(name: str, split: str | None, config: str | None) -> list[Row]:
    from datasets import DatasetDict, load_dataset

    try:
        data = load_dataset(name, config, split=None if split == "all" else split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name}: the data set cannot be loaded ({str(error)[:300]}); download it, and give the file or folder"
        ) from error
    return _lazy(_split_of(data, split, name) if isinstance(data, DatasetDict) else data)


def _split_of(data: Any, split: str | None, where: object) -> Any:
    """One split, or with "all" the concatenation of all splits, named in the column "variant"."""
    from datasets import concatenate_datasets

    if split == "all":
        return concatenate_datasets([part.add_column("variant", [name] * len(part)) for name, part in data.items()])
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        raise DataError(f"{where}: has the splits {', '.join(data)}; name one of them")
    return data[split]


def _lazy(data: Any) -> list[Row]:
    """Rows of a data set, with images replaced by functions that fetch their bytes."""
    from datasets import Image, Sequence as Listed

    if getattr(data, "_indices", None) is not None:
        data = data.flatten_indices()
    pictures = []
    for column, feature in list(data.features.items()):
        inner = getattr(feature, "feature", None)
        if isinstance(feature, Image):
            data = data.cast_column(column, Image(decode=False))
        elif isinstance(inner, Image):
            data = data.cast_column(column, Listed(Image(decode=False)))
        elif not (_holds_bytes(feature) or _holds_bytes(inner)):
            continue
        pictures.append(column)
    columns = data.remove_columns(pictures)
    shown = {column: _handles(data, column) for column in pictures}
    rows: list[Row] = []
    for number in range(len(data)):
        there = {column: handles[number] for column, handles in shown.items() if handles[number] is not None}
        rows.append({**columns[number], **there})
    return rows


def _holds_bytes(feature: Any) -> bool:
    return isinstance(feature, dict) and "bytes" in feature


def _handles(data: Any, column: str) -> list[Any]:
    """Per row: a function that fetches the picture, a list of such functions, or None where there is none."""
    from pyarrow import compute, types  # type: ignore[import-untyped]

    table = data.data.column(column)
    if types.is_list(table.type) or types.is_large_list(table.type):
        lengths = compute.list_value_length(table).to_pylist()
        return [[_fetch(data, row, column, at) for at in range(length or 0)] for row, length in enumerate(lengths)]
    valid = compute.is_valid(table).to_pylist()
    return [_fetch(data, row, column) if there else None for row, there in enumerate(valid)]


def _fetch(data: Any, row: int, column: str, at: int | None = None) -> Callable[[], Any]:
    return lambda: data[row][column] if at is None else data[row][column][at]
