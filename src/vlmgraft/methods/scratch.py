"""Memory that a thread reuses for every chunk: allocating a megabyte per chunk costs more than the arithmetic on it,
because the system maps zeroed pages one by one and unmaps them on all cores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class _Own(threading.local):
    """One thread's memory by name, and whether `scratch` reuses it."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}
        self.reused = False


_own = _Own()


@contextmanager
def reused() -> Iterator[None]:
    """Inside the context, in this thread, `scratch` returns the same memory whenever it gets the same name."""
    before, _own.reused = _own.reused, True
    try:
        yield
    finally:
        _own.reused = before


def scratch(like: Tensor, *names: str) -> list[Tensor]:
    """Float32 tensors of the shape of `like`, one per name, not initialised: new ones unless inside `reused`."""
    import torch

    if not _own.reused:
        return [torch.empty_like(like) for _ in names]
    held, count = _own.held, like.numel()
    for name in names:
        if name not in held or held[name].numel() < count:
            held[name] = torch.empty(count)
    return [held[name][:count].view(like.shape) for name in names]
