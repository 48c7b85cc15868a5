"""Open files, only so many at a time: a checkpoint of a thousand shards is read where 256 files may be open."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MOST = 32
"""Of one checkpoint: four inputs and the output stay far below the usual limits, and few files are opened twice."""


@dataclass
class _Opened:
    handle: int
    users: int = 0


class Handles:
    """Handles by file, opened when they are needed; of more than `most`, the one unused for longest is closed.

    Safe among threads: what a thread is using is never closed, so that there may be as many more as threads.
    """

    def __init__(self, flags: int, most: int = MOST) -> None:
        self._flags, self._most = flags, most
        self._opened: dict[Path, _Opened] = {}
        self._lock = threading.Lock()

    @contextmanager
    def of(self, file: Path) -> Iterator[int]:
        """A handle of `file` that stays open inside; raises OSError."""
        with self._lock:
            found = self._opened.pop(file, None)
            if found is None:
                self._make_room()
                found = _Opened(os.open(file, self._flags))
            self._opened[file] = found  # the last in order: just used
            found.users += 1
        try:
            yield found.handle
        finally:
            with self._lock:
                found.users -= 1

    def close(self) -> None:
        """Close everything; nobody may be using any."""
        with self._lock:
            for found in self._opened.values():
                os.close(found.handle)
            self._opened.clear()

    def _make_room(self) -> None:
        idle = [file for file, found in self._opened.items() if not found.users]
        for file in idle[: max(0, len(self._opened) + 1 - self._most)]:
            os.close(self._opened.pop(file).handle)
