"""Frozen result rows and their JSON lines.

A row is a frozen dataclass whose fields are JSON values. Files are written whole under a temporary name and renamed,
so a reader never sees half a file; `append_row` is for logs that must survive an interruption line by line.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmgraft.errors import DamagedError, OutputError
from vlmgraft.storage.files import new_file, sweep_files

if TYPE_CHECKING:
    from pydantic import TypeAdapter

TAIL = 4096
"""Bytes read at a time, from the end, to find the last line."""


def as_dict(row: Any) -> dict[str, Any]:
    """A row as a plain dictionary; dictionaries pass through."""
    return row if isinstance(row, dict) else dataclasses.asdict(row)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, atomically, and remove what killed writers of the file left."""
    with new_file(path) as file:
        file.write(text.encode())
    sweep_files(path.parent, path.name)


def json_text(value: Any) -> str:
    """One JSON document, indented."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, indented, atomically."""
    write_text(path, json_text(value))


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write rows as JSON lines, atomically."""
    write_text(path, _lines(rows))


def append_row(path: Path, row: Any, *, flush: bool = False) -> None:
    """`append_rows` of one row."""
    append_rows(path, [row], flush=flush)


def append_rows(path: Path, rows: Iterable[Any], *, flush: bool = False) -> None:
    """Append rows as lines in one write, in place of a line that an interruption cut short. flush: flush them to disk.

    Raises OutputError if the file is a link or not a regular file: its target may belong to somebody else.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OutputError(f"{path}: is not a regular file; remove it")
    with path.open("a+b", buffering=0) as file:
        _drop_cut_line(file)
        file.write(_lines(rows).encode())
        if flush:
            os.fsync(file.fileno())


def drop_cut_line(path: Path) -> None:
    """Remove an incomplete last line from a file, if the file exists."""
    if path.is_file():
        with path.open("r+b", buffering=0) as file:
            _drop_cut_line(file)


def _lines(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(as_dict(row), ensure_ascii=False) + "\n" for row in rows)


def _drop_cut_line(file: FileIO) -> None:
    end = size = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - TAIL)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            end = begin + newline + 1
            break
        end = begin
    if end < size:
        file.truncate(end)


def read_json(path: Path, kind: TypeAdapter[Any] | None = None) -> dict[str, Any]:
    """The object of one JSON document that vlmgraft wrote, as `json_object`; raises DamagedError, OSError."""
    return json_object(path.read_bytes(), path, kind)


def read_rows(path: Path, kind: TypeAdapter[Any] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file, as `json_object`; a last line cut short by an interruption is dropped.

    Raises DamagedError naming file and line, OSError.
    """
    *lines, cut = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield json_object(line, f"{path}, line {number}", kind)
    with suppress(DamagedError):
        yield json_object(cut, path, kind)  # a complete row without its newline


def json_object(text: bytes, where: object, kind: TypeAdapter[Any] | None = None) -> dict[str, Any]:
    """An object in JSON; raises DamagedError, which names `where`.

    kind: what it must be, by pydantic's strict rules; of such an object its fields, with their defaults, are given.
    """
    try:
        if kind is not None:
            fields: dict[str, Any] = kind.dump_python(kind.validate_json(text, strict=True))
            return fields
        document = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise DamagedError(where, error) from error
    if not isinstance(document, dict):
        raise DamagedError(where, f"{type(document).__name__} where a mapping should be")
    return document
