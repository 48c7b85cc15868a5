"""Gated projections: gradients, identities, and a model that is left as it was found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from vlmgraft.distillation.gated_layers import GatedLinear, gated
from vlmgraft.distillation.projections import FactoredProjection, RebuiltProjection
from vlmgraft.errors import AlignmentError
from vlmgraft.spectral.factors import Factors, factorize

BACKENDS = {"factored": FactoredProjection, "rebuilt": RebuiltProjection}


def make_layer(seed: int = 0, out: int = 6, inner: int = 4) -> tuple[nn.Linear, torch.Tensor, Factors]:
    torch.manual_seed(seed)
    linear, tau = nn.Linear(inner, out), torch.randn(out, inner)
    return linear, tau, factorize(tau, "w", "layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("backend", BACKENDS)
def test_identities(backend: str) -> None:
    """Zero logits: task arithmetic at λ/2; +inf: at λ; −inf: the VLM, bit for bit."""
    linear, tau, factors = make_layer()
    layer, x, scale = GatedLinear(linear, factors, backend), torch.randn(3, 5, 4), 0.8
    for logit, share in ((0.0, 0.5), (float("inf"), 1.0)):
        layer.spectrum = scale * torch.full_like(factors.s, logit).sigmoid() * factors.s
        expected = nn.functional.linear(x, linear.weight + scale * share * tau, linear.bias)
        assert torch.allclose(layer(x), expected, atol=1e-5)
    layer.spectrum = scale * torch.full_like(factors.s, float("-inf")).sigmoid() * factors.s
    assert layer(x).equal(linear(x))
    layer.spectrum = None
    assert layer(x).equal(linear(x))


TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(sorted(TOLERANCE, key=str)),
    st.sampled_from(sorted(BACKENDS)),
    st.integers(0, 9999),
)
def test_identities_hold_at_every_rank_dtype_and_backend(
    out: int, inner: int, rank: int, dtype: torch.dtype, backend: str, seed: int
) -> None:
    """Closed gates are the frozen layer bit for bit; open ones add λ times what the truncation kept of τ."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inner, out).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(out, inner, generator=generator))
    factors = factorize(torch.randn(out, inner, generator=generator), "w", "w", min(rank, out, inner))
    layer = GatedLinear(linear, factors, backend)  # type: ignore[arg-type]
    x = torch.randn(2, 3, inner, generator=generator).to(dtype)
    layer.spectrum = 0.8 * torch.full_like(factors.s, float("-inf")).sigmoid() * factors.s
    assert layer(x).equal(linear(x))
    for logit, share in ((0.0, 0.5), (float("inf"), 1.0)):
        layer.spectrum = 0.8 * torch.full_like(factors.s, logit).sigmoid() * factors.s
        whole = linear.weight.double() + 0.8 * share * factors.update().double()
        expected = x.double() @ whole.T + linear.bias.double()
        size = float((x.double().abs() @ whole.detach().abs().T).max()) + 1
        assert float((layer(x).double() - expected).abs().max()) <= TOLERANCE[dtype] * size


def test_full_rank_drops_nothing_and_the_control_keeps_the_spectrum() -> None:
    _, tau, factors = make_layer()
    assert torch.allclose(factors.update(), tau, atol=1e-5)
    shuffled = factors.shuffled(1)
    assert torch.allclose(torch.linalg.svdvals(shuffled.update()), factors.s, atol=1e-5)
    assert not torch.allclose(shuffled.update(), tau, atol=0.1)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def test_a_model_is_left_as_it_was_also_after_an_exception() -> None:
    model, x = TwoLayers(), torch.randn(3, 4)
    model.second.bias.requires_grad_(False)
    before = (model(x), {k: v.clone() for k, v in model.state_dict().items()}, list(model.children()))
    flags = [p.requires_grad for p in model.parameters()]
    factors = {"a": factorize(torch.randn(6, 4), "a", "a"), "b": factorize(torch.randn(4, 6), "b", "b")}
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        gated(model, {"a": model.first, "b": model.second}, factors) as layers,
    ):
        assert isinstance(model.first, GatedLinear)
        assert model(x).equal(before[0]), "gates are off at first"
        layers.set({name: f.s for name, f in factors.items()})
        assert not torch.allclose(model(x), before[0], atol=1e-3)
        raise RuntimeError("in the middle")
    assert model(x).equal(before[0])
    assert list(model.children()) == before[2] and list(model.state_dict()) == list(before[1])
    assert all(v.equal(before[1][k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags


def test_misfits_are_named_and_leave_the_model_alone() -> None:
    model = TwoLayers()
    first, wrong = model.first, {"a": factorize(torch.randn(5, 4), "a", "a")}
    with pytest.raises(AlignmentError, match=r"a: factors of shape \(5, 4\)"), gated(model, {"a": first}, wrong):
        pass
    with pytest.raises(AlignmentError, match="not part of the model"), gated(model, {"a": nn.Linear(4, 5)}, wrong):
        pass
    assert model.first is first
