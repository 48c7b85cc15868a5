"""Memory that a thread uses again for every chunk: a fresh megabyte per chunk costs more than the arithmetic on it,
since the system hands out zeroed pages one by one and takes them back from all cores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_own = threading.local()


@contextmanager
def reused() -> Iterator[None]:
    """Inside, in this thread, `scratch` gives the same memory for the same name again and again."""
    before = getattr(_own, "held", None)
    _own.held = before if before is not None else getattr(_own, "kept", {})
    try:
        yield
    finally:
        _own.kept, _own.held = _own.held, before


def scratch(like: Tensor, *names: str) -> list[Tensor]:
    """Float32 tensors of the shape of `like`, one per name, not initialised: new ones unless inside `reused`."""
    import torch

    held: dict[str, Tensor] | None = getattr(_own, "held", None)
    if held is None:
        return [torch.empty_like(like) for _ in names]
    count = like.numel()
    for name in names:
        if name not in held or held[name].numel() < count:
            held[name] = torch.empty(count)
    return [held[name][:count].view(like.shape) for name in names]
