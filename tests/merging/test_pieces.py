"""Pieces of checkpoints: chunks of rows that a source lacks, and where a tensor may be cut."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from merge_builders import SIDE, aligned, build, build_experts, tensors_in

from vlmgraft.merging import merge_tensors
from vlmgraft.merging.pieces import ranges, squared_norm
from vlmgraft.merging.plan import CHUNK
from vlmgraft.methods.linear import Linear

NAME = "model.embed_tokens.weight"


@pytest.mark.parametrize("donor_rows", [874, 873, 2])
def test_rows_that_the_donor_lacks_are_the_vlms_in_every_chunk(donor_rows: int, tmp_path: Path) -> None:
    """874 rows of 300 reach 56 elements into the second chunk; of 873 none does, and of 2 the third has none either."""
    assert 873 * SIDE <= CHUNK < 874 * SIDE
    build(tmp_path, rows=2000, donor_rows=donor_rows)
    merge_tensors(aligned(tmp_path, modules=["embeddings"]), Linear(0.0), tmp_path / "out")
    vlm, donor, out = (tensors_in(tmp_path / key)[NAME] for key in ("vlm", "donor", "out"))
    assert out[:donor_rows].equal(donor) and out[donor_rows:].equal(vlm[donor_rows:])


def test_only_tensors_in_the_order_of_the_vlm_are_cut(tmp_path: Path) -> None:
    build(tmp_path / "plain")
    build_experts(tmp_path / "experts")
    plain = next(tensor for tensor in aligned(tmp_path / "plain").merged if "q_proj" in tensor.name)
    fused = next(tensor for tensor in aligned(tmp_path / "experts").merged if "gate_up_proj" in tensor.name)
    assert list(ranges(plain, 1001, 500)) == [(0, 500), (500, 1000), (1000, 1001)]
    assert list(ranges(fused, 1001, 500)) == [(0, 1001)]


def test_a_squared_norm_is_that_of_float64_also_beyond_float32_and_nan_is_never_lost() -> None:
    piece = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert squared_norm(piece) == pytest.approx(float(piece.double().square().sum()), rel=1e-6)
    piece[7] = 2.0**100
    assert squared_norm(piece) == pytest.approx(2.0**200)
    for value in (math.nan, math.inf, -math.inf):
        piece[-1] = value
        assert math.isnan(squared_norm(piece))
