"""Dropping entries at random, as DARE does (arXiv 2311.03099), reproducibly: what `dare_linear` and `dare_ties` share.

An entry of a task vector is kept with probability `density` (the paper's 1 − p) and divided by `density`, so that its
expectation stays. Which ones are kept is a function of (seed, source, tensor name, entry) alone: every block of 65,536
entries has a random stream of its own (numpy's SFC64, whose streams are fixed), whatever the order, the number of
threads, the chunks or the shards. The probability is exact to 2⁻³².
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from vlmgraft.methods.base import TensorContext

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 16


def keep_mask(seed: int, source: str, context: TensorContext, count: int, density: float) -> Tensor:
    """Which of `count` entries from `context.start` on are kept: bool [count]."""
    import numpy as np
    import torch

    at, end, pieces = context.start, context.start + count, []
    limit = round(density * 2**32)
    while at < end:
        block = at // BLOCK
        stop = min(end, (block + 1) * BLOCK)
        digest = hashlib.sha256(f"{seed}/{source}/{context.name}/{block}".encode()).digest()[:16]
        raw = np.random.SFC64(int.from_bytes(digest, "little")).random_raw(BLOCK // 2)
        draws = raw.astype("<u8", copy=False).view("<u4")
        pieces.append(draws[at - block * BLOCK : stop - block * BLOCK] < limit)
        at = stop
    return torch.from_numpy(np.concatenate(pieces) if pieces else np.zeros(0, dtype=bool))


def drop(tau: Tensor, seed: int, source: str, context: TensorContext, density: float, rescale: bool) -> Tensor:
    """τ with entries dropped and, when `rescale`, the others divided by `density`; τ's own memory where it can be."""
    import numpy as np

    if density >= 1:
        return tau
    tau = tau.contiguous()
    values = tau.view(-1).numpy()
    np.multiply(values, keep_mask(seed, source, context, tau.numel(), density).numpy(), out=values)
    return tau.div_(density) if rescale else tau
