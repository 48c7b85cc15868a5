"""Untrusted JSON lines: read one by one, of bounded length, with strings that UTF-8 can encode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.files import open_regular
from vlmgraft.errors import CheckpointError, DataError
from vlmgraft.storage.limits import MAX_LINE


def json_lines(path: Path, errors: str = "strict") -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not empty, read one by one.

    errors: handling of UTF-8 errors, as in `bytes.decode`.
    Raises:
        DataError: a line that is no JSON object, or longer than `MAX_LINE`, naming file and line.
    """
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
                if len(line) > MAX_LINE:
                    raise DataError(f"{path}, line {number}: has more than {MAX_LINE:,} bytes; name images by path")
                if line.strip():
                    yield number, _object(line, f"{path}, line {number}", errors)
    except CheckpointError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file of JSON lines") from None


def parse(raw: bytes, errors: str = "strict") -> Any:
    """Parse a JSON text whose strings UTF-8 can encode: a lone escaped surrogate is an error.

    Raises ValueError or RecursionError; with errors="replace" a lone surrogate becomes a question mark.
    """
    value = json.loads(raw.decode("utf-8", errors))
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", errors)) if b"\\u" in raw else value


def _object(line: bytes, where: str, errors: str) -> dict[str, Any]:
    try:
        row = parse(line, errors)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error!s:.200}); every line must be one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object, got {line[:60]!r}")
    return row
