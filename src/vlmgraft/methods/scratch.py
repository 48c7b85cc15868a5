"""Memory that a thread uses again for every chunk: fresh megabytes per chunk cost more than the arithmetic on them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_own = threading.local()


def scratch(like: Tensor, *names: str) -> list[Tensor]:
    """Float32 tensors of the shape of `like`, one per name, not initialised.

    They belong to the calling thread; the next call with a name gives the same memory.
    """
    import torch

    held: dict[str, Tensor] = _own.__dict__
    count = like.numel()
    for name in names:
        if name not in held or held[name].numel() < count:
            held[name] = torch.empty(count)
    return [held[name][:count].view(like.shape) for name in names]
