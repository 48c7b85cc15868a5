"""Shared by reader and writer: a bounded pool of open files, and safetensors' dtypes and bytes in torch.

A checkpoint of a thousand shards can be read where a process may open only 256 files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MAX_OPEN = 32
"""Most open files per checkpoint: four inputs and the output stay far below the usual limit of 256 or more."""


@dataclass
class _Opened:
    """An open file and how many threads are using it."""

    handle: int
    users: int = 0


class Handles:
    """File handles, opened on demand; beyond `most`, the least recently used one is closed.

    Thread-safe: a handle in use is never closed, so up to one more per thread may be open.
    """

    def __init__(self, flags: int, most: int = MAX_OPEN) -> None:
        self._flags, self._most = flags, most
        self._files: dict[Path, _Opened] = {}
        self._lock = threading.Lock()

    @contextmanager
    def of(self, file: Path) -> Iterator[int]:
        """A handle of `file` that stays open inside the context; raises OSError."""
        with self._lock:
            opened = self._files.pop(file, None)
            if opened is None:
                self._make_room()
                opened = _Opened(os.open(file, self._flags))
            self._files[file] = opened  # last in order: most recently used
            opened.users += 1
        try:
            yield opened.handle
        finally:
            with self._lock:
                opened.users -= 1

    def close(self) -> None:
        """Close all handles; none may be in use."""
        with self._lock:
            for opened in self._files.values():
                os.close(opened.handle)
            self._files.clear()

    def _make_room(self) -> None:
        idle = [file for file, opened in self._files.items() if not opened.users]
        for file in idle[: max(0, len(self._files) + 1 - self._most)]:
            os.close(self._files.pop(file).handle)


TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
}
CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor with elements, writable, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
