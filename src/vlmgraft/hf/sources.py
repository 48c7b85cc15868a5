"""Rows from files and data sets: JSON lines, JSON, parquet, folders and ids of `datasets`.

Pictures inside parquet files and data sets stay there until they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.files import open_regular
from vlmgraft.errors import CheckpointError, DataError
from vlmgraft.hf.questions import json_lines, parse

Row = Mapping[str, Any]
LARGEST_JSON = 1 << 30
READABLE = ".jsonl, .json, .parquet, a folder of parquet files or one that `datasets` saved, or a data set's id"


def read_rows(
    source: str | Path, *, split: str | None = None, config: str | None = None, errors: str = "replace"
) -> tuple[list[Row], Path | None]:
    """The rows of a source, and the folder that image paths are relative to (None for the hub).

    JSON files hold a list of objects, an object of objects (their keys become "id"), or JSON lines. errors: of
    decoding UTF-8 in JSON lines. Raises DataError.
    """
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


def _could_be_id(source: str) -> bool:
    return (
        source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not source.endswith((".jsonl", ".json"))
    )


def _json(path: Path) -> list[Row]:
    if path.stat().st_size > LARGEST_JSON:
        raise DataError(f"{path}: has more than {LARGEST_JSON:,} bytes; write JSON lines, which are read one by one")
    try:
        with open_regular(path) as file:
            raw = file.read()
        found = parse(raw)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give {READABLE}") from None
    except CheckpointError as error:
        raise DataError(str(error)) from None
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data") and raw.lstrip().startswith(b"{"):
            return [row for _, row in json_lines(path)]
        raise DataError(f"{path}: not JSON ({error!s:.200}); write one JSON object per line as .jsonl") from error
    if isinstance(found, dict) and found and all(isinstance(row, dict) for row in found.values()):
        found = [{"id": name, **row} for name, row in found.items()]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(f"{path}: is JSON, but must be a list of objects, or an object of objects")
    return found


def _local_dataset(path: Path, split: str | None) -> list[Row]:
    from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

    if path.is_dir() and not list(path.glob("*.parquet")):
        try:
            found = load_from_disk(str(path))
        except (FileNotFoundError, ValueError, OSError) as error:
            raise DataError(f"{path}: holds no data set ({error}); give {READABLE}") from error
        if isinstance(found, DatasetDict):
            found = _split_of(found, split, path)
        return _lazy(found)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if split and path.is_dir():
        files = [file for file in files if file.name.startswith(split)] or files
    if not files or not files[0].is_file():
        raise DataError(f"{path}: no such file; give {READABLE}")
    try:
        return _lazy(concatenate_datasets([Dataset.from_parquet(str(file)) for file in files]))
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, MemoryError) as error:
        raise DataError(f"{path}: no parquet file ({str(error)[:200]}); download it again") from error


def _hub_dataset(name: str, split: str | None, config: str | None) -> list[Row]:
    from datasets import DatasetDict, load_dataset

    try:
        found = load_dataset(name, config, split=None if split == "all" else split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name}: the data set cannot be loaded ({str(error)[:300]}); download it, and give the file or folder"
        ) from error
    return _lazy(_split_of(found, split, name) if isinstance(found, DatasetDict) else found)


def _split_of(found: Any, split: str | None, where: object) -> Any:
    """One split; "all" of them with their names in the column "variant"."""
    from datasets import concatenate_datasets

    if split == "all":
        return concatenate_datasets([part.add_column("variant", [name] * len(part)) for name, part in found.items()])
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        raise DataError(f"{where}: has the splits {', '.join(found)}; name one of them")
    return found[split]


def _lazy(data: Any) -> list[Row]:
    """Rows of a data set, with functions that fetch the bytes in place of pictures."""
    from datasets import Image
    from datasets import Sequence as Listed

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
    told = data.remove_columns(pictures)
    shown = {column: _handles(data, column) for column in pictures}
    rows: list[Row] = []
    for number in range(len(data)):
        there = {column: handles[number] for column, handles in shown.items() if handles[number] is not None}
        rows.append({**told[number], **there})
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
