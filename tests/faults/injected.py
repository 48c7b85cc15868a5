"""Faults at chosen writes: every call that needs room on a disk is counted, and from one on it does something else.

Patched in this process: files opened for writing, and the calls of `os`, of the safetensors library and of `torch.save`
that write by themselves. What lies outside `under` is left alone.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

Action = Callable[[str, Path], None]
BY_HANDLE = ("pwrite", "pwritev", "posix_fallocate", "ftruncate", "fsync", "sendfile")
BY_PATH = ("mkdir", "rename", "replace", "symlink", "link")
SPACE = "No space left on device"


class Writes:
    """What was written, one (call, file) after the other; `act` is called with them from number `first` on."""

    def __init__(self, under: Path, act: Action | None = None, first: int = 1) -> None:
        self.under, self.act, self.first = under.resolve(), act, first
        self.seen: list[tuple[str, Path]] = []
        self.lock = threading.Lock()

    def __call__(self, call: str, path: Any) -> None:
        try:
            where = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else Path(os.fsdecode(path))
        except (OSError, TypeError):
            return
        where = where.absolute()
        if self.under not in (where, *where.parents):
            return
        with self.lock:  # several threads write, and each must find its own number
            self.seen.append((call, where.relative_to(self.under)))
            number = len(self.seen)
        if self.act is not None and number >= self.first:
            self.act(call, where)


class _File(io.FileIO):
    """A file whose writes are counted."""

    writes: Writes

    def write(self, data: Any) -> int:  # type: ignore[override]
        self.writes("write", self.fileno())
        return super().write(data)


def full(call: str, path: Path) -> None:
    """The disk is full: as the system, or the library that calls it, says so."""
    if call == "serialize_file":
        raise SafetensorError(f"Error while serializing: I/O error: {SPACE} (os error {errno.ENOSPC})")
    if call == "torch.save":
        raise RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/0")
    named = None if call in ("write", *BY_HANDLE) else str(path)  # those know no name, as in the system
    raise OSError(errno.ENOSPC, SPACE, named)


def at(moment: int, number: int) -> Callable[[Path], Writes]:
    """Writes that send this process a signal once, at the write of this number."""

    def made(under: Path) -> Writes:
        sent: list[int] = []

        def stop(call: str, path: Path) -> None:
            if not sent:
                sent.append(number)
                os.kill(os.getpid(), number)

        return Writes(under, stop, moment)

    return made


@contextmanager
def counted(writes: Writes) -> Iterator[Writes]:
    """All writes inside go through `writes`."""
    before: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, made: Any) -> None:
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, made)

    def wrap(owner: Any, name: str, place: int, said: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            writes(said, args[place])
            return real(*args, **options)

        patch(owner, name, call)

    for name in BY_HANDLE:
        wrap(os, name, 0, name)
    for name in BY_PATH:
        wrap(os, name, -1 if name in ("rename", "replace") else 0, name)
    wrap(safetensors.torch, "serialize_file", 1, "serialize_file")
    wrap(torch, "save", 1, "torch.save")
    opener = _opener(writes)
    patch(builtins, "open", opener)
    patch(io, "open", opener)
    try:
        yield writes
    finally:
        for owner, name, real in reversed(before):
            setattr(owner, name, real)


def _opener(writes: Writes) -> Callable[..., Any]:
    real = io.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+") or options.get("opener"):
            return real(file, mode, buffering, *args, **options)
        if set(mode) & set("wx") or not Path(file).exists():
            writes("open", file)
        kind = type("_Counted", (_File,), {"writes": writes})
        raw = kind(os.fspath(file), mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        size = io.DEFAULT_BUFFER_SIZE if buffering < 2 else buffering
        buffered = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **options)

    return opened
