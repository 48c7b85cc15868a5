"""Frozen result rows and their JSON lines.

A row is a frozen dataclass whose fields are JSON values. Files are written whole under a temporary name and renamed,
so a reader never sees half a file; `append_row` is for logs that must survive an interruption line by line.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmgraft.durable import new_file, sweep_files


@contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection inside: making 100,000 rows at once, none of them garbage, takes half as long again with
    it. For work of seconds."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def as_dict(row: Any) -> dict[str, Any]:
    """A row as a plain dictionary; dictionaries pass through."""
    return row if isinstance(row, dict) else dataclasses.asdict(row)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 as a file that is whole or absent; what killed writers of it left is removed."""
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
    write_text(path, "".join(json.dumps(as_dict(row), ensure_ascii=False) + "\n" for row in rows))


def append_row(path: Path, row: Any) -> None:
    """Append one row as one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(as_dict(row), ensure_ascii=False) + "\n")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line cut short by an interruption is dropped."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) - 1:
                return
            raise ValueError(f"{path}, line {number + 1}: not JSON: {line[:80]!r}") from None
