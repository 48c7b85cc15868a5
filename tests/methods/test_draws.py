"""Random numbers of an entry: the generator's own words, whatever the piece that is asked for."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from fake_merge import context_of

from vlmgraft.methods.draws import BLOCK, draws

NAME = "model.layers.0.mlp.up_proj.weight"


def block(number: int, seed: int = 7, source: str = "donor") -> np.ndarray:
    """65,536 numbers of one block, written out: the low half of a 64-bit word comes first."""
    digest = hashlib.sha256(f"{seed}/{source}/{NAME}/{number}".encode()).digest()[:16]
    words = np.random.SFC64(int.from_bytes(digest, "little")).random_raw(BLOCK // 2)
    return np.stack([words & 0xFFFFFFFF, words >> 32], axis=1).reshape(-1).astype(np.uint32)


@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (0, BLOCK), (BLOCK - 1, 2), (BLOCK, 5), (3, 2 * BLOCK), (2 * BLOCK - 1, 1), (5, 0)]
)
def test_a_piece_is_cut_from_the_blocks(start: int, count: int) -> None:
    context = replace(context_of(NAME, (3, BLOCK)), start=start)
    whole = np.concatenate([block(0), block(1), block(2)])
    found = draws(7, "donor", context, count)
    assert found.dtype == np.uint32 and np.array_equal(found, whole[start : start + count])
