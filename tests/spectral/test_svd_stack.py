"""Fused experts: every expert's SVD is that of its own matrix, and what fails alone is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vlmgraft.errors import NumericalError
from vlmgraft.spectral import svd_stack as module
from vlmgraft.spectral.factors import factorize
from vlmgraft.spectral.svd import decompose_matrix, passes, probe
from vlmgraft.spectral.svd_stack import decompose_stack


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_every_expert_is_decomposed_as_alone(experts: int, out: int, inner: int, seed: int) -> None:
    tau = draw(experts, out, inner, seed=seed)
    found = decompose_stack(tau)
    assert found.s.shape == (experts, min(out, inner)) and found.error <= 1e-5
    assert torch.allclose((found.U * found.s[:, None]) @ found.Vh, tau, atol=1e-5)
    for index in range(experts):
        assert torch.allclose(found.s[index], decompose_matrix(tau[index]).s, atol=1e-5)
    assert found.energy == pytest.approx(float(tau.double().square().sum()), rel=1e-6)


def test_experts_go_in_batches_that_fit_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    tau, sizes = draw(7, 6, 4), []
    whole, before = decompose_stack(tau), module._batch
    monkeypatch.setattr(module, "WORKSPACE", 2 * 8 * (6 * 4 + 3 * 16))
    monkeypatch.setattr(module, "_batch", lambda piece, name: sizes.append(len(piece)) or before(piece, name))
    found = decompose_stack(tau)
    assert sizes == [2, 2, 2, 1] and torch.allclose(found.s, whole.s, atol=1e-6)


def test_an_expert_that_fails_the_probes_is_decomposed_alone() -> None:
    tau = draw(3, 12, 8)
    tau[1] = draw(12, 1) @ draw(1, 8)  # rank one: the columns of B are rounding noise, their normalised form is no U
    tau[2] = 0
    found = decompose_stack(tau)
    assert found.route == "gram, 2 alone" and found.error <= 1e-5
    assert torch.allclose((found.U * found.s[:, None]) @ found.Vh, tau, atol=1e-5)
    gram = found.U[1].T @ found.U[1]
    assert torch.allclose(gram, torch.eye(8), atol=1e-3)


def test_ranks_are_the_same_for_all_experts() -> None:
    tau = draw(3, 6, 10)
    tau[0] = 5 * draw(6, 1) @ draw(1, 10) + 0.01 * tau[0]
    assert decompose_stack(tau, 2).s.shape == (3, 2)
    needs = [len(decompose_matrix(expert, {"energy": 0.9}).s) for expert in tau]
    assert min(needs) < max(needs) == decompose_stack(tau, {"energy": 0.9}).s.shape[1]
    kept = factorize(tau, "layers.0.mlp.experts.down_proj", "layers.0.mlp.experts.down_proj", 2)
    assert kept.shape == (3, 6, 10) and kept.update().shape == tau.shape


def test_a_bad_expert_is_named() -> None:
    tau = draw(3, 4, 4)
    tau[1, 2, 2] = float("inf")
    with pytest.raises(NumericalError, match=r"experts\.down_proj, expert 1: holds NaN"):
        decompose_stack(tau, name="experts.down_proj")
    with pytest.raises(NumericalError, match="not a stack"):
        decompose_stack(tau[0])


def test_the_error_is_the_largest_of_all_experts_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    residuals = iter([torch.tensor([1e-6, 4e-6]), torch.tensor([3e-6, 2e-6])])
    monkeypatch.setattr(module, "WORKSPACE", 2 * 8 * (6 * 4 + 3 * 16))
    monkeypatch.setattr(module, "probe", lambda *args: next(residuals)[:, None] * torch.tensor([1.0, 0.0, 0.0]))
    assert decompose_stack(draw(4, 6, 4)).error == pytest.approx(4e-6)


def test_well_conditioned_experts_pass_the_probes_together() -> None:
    """The residual is that of U diag(s) against τ: factors that fit pass, a spectrum 1 % off does not."""
    tau = draw(3, 12, 8)
    result = decompose_stack(tau)
    assert result.route == "gram" and result.error < 1e-5
    errors = probe(tau, result.U, 1.01 * result.s, result.Vh)
    assert errors[:, 0].tolist() == pytest.approx([0.01 / 1.01] * 3, rel=1e-3) and not bool(passes(errors).any())
