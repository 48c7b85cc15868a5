"""Reading untrusted files: regular files only, of bounded size, with standard JSON.

A folder that was downloaded or unpacked may hold anything under a file's name: a FIFO or a device on which `open` or
`read` blocks forever, a link to another place, or text that takes a hundred times its size once it is parsed.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any

from vlmgraft.errors import CheckpointError
from vlmgraft.storage.limits import MAX_JSON, MAX_TENSORS

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_COMMAS = 12
"""Most commas per tensor in a header: three fields, two offsets, and a shape of up to eight numbers."""


def open_regular(file: Path) -> BufferedReader:
    """Open a file for reading if it is a regular file or a link to one; never blocks.

    Raises:
        CheckpointError: it is something else. OSError: it cannot be opened.
    """
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError(f"{file}: is {_kind(file)}, not a file; put the real file in its place")
    return os.fdopen(handle, "rb")


def refuse_special(folder: Path) -> None:
    """Raise CheckpointError if a folder holds anything but files and folders, such as a FIFO or a broken link.

    For folders that a library will read: it opens whatever has an expected name.
    """
    for entry in os.scandir(folder):
        if not (entry.is_file() or entry.is_dir()):
            path = folder / entry.name
            raise CheckpointError(f"{path}: is {_kind(path)}, not a file; remove it, or download the file again")


def _kind(path: Path) -> str:
    """The kind of file that a path leads to, in words."""
    try:
        return kind_of(path.stat().st_mode)
    except OSError:
        return "a link that leads nowhere"


def kind_of(mode: int) -> str:
    """The kind of file with this `st_mode`, in words."""
    kinds = {
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISSOCK: "a socket",
        stat.S_ISDIR: "a folder",
        stat.S_ISLNK: "a link",
    }
    return next((name for test, name in kinds.items() if test(mode)), "something else")


def parse_json(raw: bytes, where: str, *, strict: bool = True) -> dict[str, Any]:
    """Parse a JSON object in UTF-8 that holds no more values than a checkpoint can need.

    strict: standard JSON without duplicate keys or NaN (configs written by Python may contain Infinity). -0 is then not
    read as an integer, as in the safetensors library.
    Raises:
        CheckpointError: naming `where`.
    """
    if raw.count(b",") > _COMMAS * MAX_TENSORS or raw.count(b"[") + raw.count(b"{") > 3 * MAX_TENSORS:
        raise CheckpointError(f"{where} holds more than {MAX_TENSORS:,} tensors can need; shard the checkpoint anew")
    try:
        options: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _no_constant, "parse_int": _whole}
        document = json.loads(raw.decode("utf-8"), **options if strict else {})
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON ({error}); download it again") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{where} is JSON, but {type(document).__name__} and no mapping; download it again")
    return document


def load_json(file: Path, limit: int = MAX_JSON, *, strict: bool = False) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes, see `parse_json`; raises CheckpointError."""
    return parse_json(read_small(file, limit), f"{file}:", strict=strict)


def read_small(file: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit`; raises CheckpointError."""
    try:
        with open_regular(file) as handle:
            raw = handle.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); download it again") from None
    if len(raw) > limit:
        raise CheckpointError(f"{file}: has more than {limit:,} bytes, which no such file needs; download it again")
    return raw


def _whole(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys must differ."""
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r:.120} twice")
    return mapping


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def inside(file: Path, folder: Path) -> bool:
    """Whether a file, with links resolved, lies in `folder`, or in the repository of the hub's cache that `folder`
    (snapshots/REVISION) belongs to."""
    real, home = file.resolve(), folder.resolve()
    blobs = [home.parent.parent / "blobs"] if home.parent.name == "snapshots" else []
    return any(parent in real.parents for parent in (home, *blobs))


def public_name(folder: Path) -> str:
    """The public name of a folder: organisation/name for a snapshot in the hub's cache, else the folder's own name."""
    if folder.parent.name != "snapshots":
        return folder.name
    return folder.parents[1].name.removeprefix("models--").replace("--", "/", 1)
