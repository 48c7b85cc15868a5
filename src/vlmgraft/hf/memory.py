"""Out of memory on the device, turned into an error that says what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlmgraft.errors import VlmgraftError


@contextmanager
def out_of_memory(doing: str, remedy: str) -> Iterator[None]:
    """Turn torch.OutOfMemoryError inside the context into VlmgraftError: what was being done, and what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise VlmgraftError(f"out of memory while {doing}: {remedy} ({error})") from error
