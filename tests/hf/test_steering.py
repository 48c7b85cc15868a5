"""Steering: the arithmetic by hand and in numpy, a file, and a model that is as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmgraft.errors import AlignmentError, CheckpointError, RecipeError
from vlmgraft.hf.models import load_vlm
from vlmgraft.hf.modules import text_model
from vlmgraft.hf.steering import Steering, resample, steer_states


def test_states_turn_and_keep_their_norm() -> None:
    """h = (3, 0), d along y, a = 1: 45 degrees, norm 3. a = 0 changes no bit; a state of zero stays."""
    states = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, -2.0]])
    turned = steer_states(states, torch.tensor([0.0, 7.0]), 1.0)
    expected = torch.tensor([[3 * 0.5**0.5, 3 * 0.5**0.5], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(turned, expected)
    torch.testing.assert_close(steer_states(states, torch.tensor([0.0, 7.0]), 0.5)[2], torch.tensor([0.0, -2.0]))
    assert steer_states(states.bfloat16(), torch.tensor([0.0, 7.0]), 1.0).dtype == torch.bfloat16


def test_resampling_keeps_low_waves_and_their_height() -> None:
    """A wave of three periods over 48 stays one of three periods over 64 or 20; one of twenty periods is filtered."""
    x = np.arange(48) / 48
    low, high = 2 + np.cos(2 * np.pi * 3 * x), np.sin(2 * np.pi * 20 * x)
    for width in (20, 64):
        expected = 2 + np.cos(2 * np.pi * 3 * np.arange(width) / width)
        found = resample(torch.from_numpy(low + high).float(), width, 0.25).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
    same = torch.from_numpy(low + high).float()
    torch.testing.assert_close(resample(same, 48, 1.0), same, atol=1e-5, rtol=0)
    with pytest.raises(RecipeError, match="kept"):
        resample(same, 48, 0.0)


@pytest.fixture(scope="module")
def model(trio: Path) -> Any:
    return load_vlm(trio / "vlm", torch.float32)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(10, 34).reshape(3, 8)).logits


def test_a_model_is_steered_inside_the_context_only(model: Any, tmp_path: Path) -> None:
    before = logits(model)
    made = Steering(torch.randn(128, generator=torch.Generator().manual_seed(0)), 2, 0.3, {"donor": "d"})
    made.save(tmp_path / "v.safetensors")
    steering = Steering.load(tmp_path / "v.safetensors")
    assert steering.direction.equal(made.direction) and (steering.layer, steering.strength) == (2, 0.3)
    assert steering.made_from == {"donor": "d"}
    with pytest.raises(KeyboardInterrupt), steering.applied(model):
        assert not logits(model).equal(before)
        raise KeyboardInterrupt
    assert logits(model).equal(before)
    with steering.applied(model, strength=0.0):
        assert logits(model).equal(before)


def test_it_acts_behind_its_layer(model: Any) -> None:
    seen: list[torch.Tensor] = []
    layers = text_model(model).layers
    handle = layers[2].register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    direction = torch.zeros(128)
    direction[5] = 1.0
    try:
        logits(model)
        with Steering(direction, 1, 0.5).applied(model):
            logits(model)
        with Steering(direction, 2, 0.5).applied(model):
            logits(model)
    finally:
        handle.remove()
    torch.testing.assert_close(seen[1], steer_states(seen[0], direction, 0.5))
    assert seen[2].equal(seen[0])


def test_what_does_not_fit_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(AlignmentError, match="layer 9 and width 128"), Steering(torch.ones(128), 9, 0.1).applied(model):
        pass
    with pytest.raises(AlignmentError, match="width 64"), Steering(torch.ones(64), 1, 0.1).applied(model):
        pass
    with pytest.raises(RecipeError, match="finite"), Steering(torch.ones(128), 1, float("inf")).applied(model):
        pass
    (tmp_path / "x").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="is no steering vector"):
        Steering.load(tmp_path / "x")
