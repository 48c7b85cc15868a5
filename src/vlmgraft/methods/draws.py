"""Random numbers that depend on the entry alone, so that threads, shards and order do not change a merge."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from vlmgraft.methods.base import TensorContext

BLOCK = 1 << 16


def draws(seed: int, source: str, context: TensorContext, count: int) -> np.ndarray:
    """Uniform uint32 [count] for the entries from `context.start` on, a function of seed, source, tensor and entry."""
    import numpy as np

    position, end, pieces = context.start, context.start + count, []
    while position < end:
        block = position // BLOCK
        stop = min(end, (block + 1) * BLOCK)
        digest = hashlib.sha256(f"{seed}/{source}/{context.name}/{block}".encode()).digest()[:16]
        raw = np.random.SFC64(int.from_bytes(digest, "little")).random_raw(BLOCK // 2)
        words = raw.astype("<u8", copy=False).view("<u4")
        pieces.append(words[position - block * BLOCK : stop - block * BLOCK])
        position = stop
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint32)
