"""Weights are exchanged in memory and put back, the same memory with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_tools import bits, same_bits

from vlmgraft.analysis.swap import StoredWeights, swapped, text_parameters
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError

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
