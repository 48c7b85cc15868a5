"""Factors of one matrix and of several donors side by side, against the matrices themselves."""

from __future__ import annotations

import pytest
import torch

from vlmgraft.errors import CheckpointError
from vlmgraft.spectral.factors import Factors, factorize, join_donors


def example(name: str = "model.layers.0.mlp.up_proj.weight", seed: int = 0) -> Factors:
    tau = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
    return factorize(tau, name, name.removeprefix("model."))


def test_joined_donors_add_up_and_keep_a_gate_each() -> None:
    first, second = example("a", 1), example("a", 2)
    joined = join_donors([{"a": first}, {"a": second, "b": example("b", 3)}])
    assert torch.allclose(joined["a"].update(), first.update() + second.update(), atol=1e-5)
    only_second = torch.cat([torch.zeros(5), second.s])
    assert torch.allclose(joined["a"].update(only_second), second.update(), atol=1e-5)
    assert joined["b"].s.equal(example("b", 3).s) and joined["a"].energy == first.energy + second.energy
    with pytest.raises(CheckpointError, match="a: the donors' factors have shapes"):
        join_donors([{"a": first}, {"a": factorize(torch.ones(2, 2), "a", "a")}])


def test_factors_multiply_to_the_matrix_and_to_other_spectra() -> None:
    tau = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    factors = factorize(tau, "a.weight", "weight")
    assert factors.shape == (7, 5) and factors.energy == pytest.approx(float(tau.square().sum()), rel=1e-6)
    assert torch.allclose(factors.update(), tau, atol=1e-5)
    assert torch.allclose(factors.update(2 * factors.s), 2 * tau, atol=1e-5)
    low = factors.to(dtype=torch.bfloat16)
    assert low.U.dtype == low.Vh.dtype == torch.bfloat16 and low.s.dtype == torch.float32


def test_shuffled_factors_keep_spectrum_and_vectors_in_other_pairs() -> None:
    factors = example()
    control = factors.shuffled(1)
    assert control.s.equal(factors.s) and control.U.equal(factors.U)
    assert not control.Vh.equal(factors.Vh)
    assert sorted(control.Vh[:, 0].tolist()) == sorted(factors.Vh[:, 0].tolist())
    assert control.Vh.equal(factors.shuffled(1).Vh) and not control.Vh.equal(factors.shuffled(2).Vh)
