"""What is merged in memory is what a merge writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlmgraft.alignment import align
from vlmgraft.analysis.in_memory import Rebuilder
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import AlignmentError
from vlmgraft.merging import merge_tensors
from vlmgraft.methods import METHODS
from vlmgraft.spectral.factors import Factors

CASES: list[tuple[str, dict[str, Any]]] = [
    ("task_arithmetic", {"scale": 0.7}),
    ("linear", {"vlm_weight": 0.8}),
    ("ties", {}),
    ("dare_linear", {"seed": 3}),
    ("layer_swap", {"keep_layers": 1}),
    ("spectral", {"rule": "truncate", "rank": 8}),
    ("spectral", {"rule": "rank_k", "rank": 3}),
    ("spectral", {"rule": "sar", "rank": 5}),
    ("spectral", {"rule": "rank_k", "interpolation": 0.2}),
    ("spectral", {"rule": "star", "eta": 0.7}),
    ("spectral", {"rule": "iso", "scale": 0.3}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_weights_are_those_of_the_merged_folder(
    name: str, options: dict[str, Any], trio: Path, tmp_path: Path, factors: dict[str, Factors]
) -> None:
    vlm, donor, base = (open_checkpoint(trio / one) for one in ("vlm", "donor", "base"))
    alignment = align(vlm, donor, base, base, modules=["mlp"], layers="1-2")
    method = METHODS[name](**options)
    merge_tensors(alignment, method, tmp_path / "merged", threads=1)
    written = open_checkpoint(tmp_path / "merged")
    with Rebuilder(alignment, factors) as rebuilder, Reader(written) as reader:
        weights = rebuilder.weights(method)
        for tensor in alignment.merged:
            on_disk = reader.tensor(tensor.name)
            mine = weights.get(str(tensor.role))
            if mine is None:
                with Reader(vlm) as own:
                    assert torch.equal(on_disk, own.tensor(tensor.name))
            elif name == "spectral":  # Krylov and the full decomposition differ in rounding
                torch.testing.assert_close(mine.to(on_disk.dtype), on_disk, rtol=2e-2, atol=1e-4)
            else:
                assert torch.equal(mine.to(on_disk.dtype), on_disk)
    assert name in ("layer_swap",) or len(weights) == len(alignment.merged) == 6


def test_scale_zero_leaves_every_tensor_out(trio: Path, factors: dict[str, Factors]) -> None:
    vlm, donor, base = (open_checkpoint(trio / one) for one in ("vlm", "donor", "base"))
    with Rebuilder(align(vlm, donor, base), factors) as rebuilder:
        assert rebuilder.weights(METHODS["task_arithmetic"](scale=0.0)) == {}
        assert rebuilder.weights(METHODS["spectral"](scale=0.0)) == {}


def test_what_a_method_needs_is_asked_for(trio: Path) -> None:
    alignment = align(open_checkpoint(trio / "vlm"), open_checkpoint(trio / "donor"), open_checkpoint(trio / "base"))
    with Rebuilder(alignment) as rebuilder, pytest.raises(AlignmentError, match="vlm_base"):
        rebuilder.weights(METHODS["ties"]())
