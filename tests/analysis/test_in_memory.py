"""What is merged in memory is what a merge writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_tools import bits, same_bits

from vlmgraft.alignment import align
from vlmgraft.analysis.in_memory import Rebuilder, StoredWeights, swapped, text_parameters
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


ROLE = "layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("fails", [False, True])
def test_the_parameters_have_their_own_memory_again(vlm_model: Any, fails: bool) -> None:
    parameters, before = text_parameters(vlm_model), bits(vlm_model)
    pointers = {role: one.data_ptr() for role, one in parameters.items()}
    others = {role: torch.randn_like(one) for role, one in parameters.items()}
    try:
        with swapped(parameters, others):
            assert all(torch.equal(parameters[role], others[role]) for role in others)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert same_bits(vlm_model, before)
    assert pointers == {role: one.data_ptr() for role, one in parameters.items()}


def test_a_failure_while_swapping_leaves_nothing_behind(vlm_model: Any) -> None:
    parameters, before = text_parameters(vlm_model), bits(vlm_model)
    other = "layers.0.mlp.up_proj.weight"
    for wrong, message in (
        ({other: torch.zeros(256, 128), ROLE: torch.zeros(3, 3)}, "holds it as"),
        ({other: torch.zeros(256, 128), "layers.9.wqkv.weight": torch.zeros(3, 3)}, "has none"),
    ):
        with pytest.raises(AlignmentError, match=message), swapped(parameters, wrong):
            raise AssertionError("must not be entered")
    assert same_bits(vlm_model, before)


def test_stored_weights_are_those_of_the_loaded_model(vlm_model: Any, trio: Path) -> None:
    parameters = text_parameters(vlm_model)
    with StoredWeights(open_checkpoint(trio / "vlm")) as stored:
        assert set(stored) == set(parameters) and len(stored) == len(parameters)
        assert all(torch.equal(stored[role].float(), one.data) for role, one in parameters.items())
        with pytest.raises(KeyError):
            stored["layers.77.mlp.up_proj.weight"]
