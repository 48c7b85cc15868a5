"""Gated projections: gradients, identities, and a model that is left as it was found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlmgraft.errors import AlignmentError
from vlmgraft.spectral.factors import Factors, factorize
from vlmgraft.training.gated import GatedLinear, gated
from vlmgraft.training.projections import FactoredProjection, RebuiltProjection, choose_backend, gated_naive

BACKENDS = {"factored": FactoredProjection, "rebuilt": RebuiltProjection}


def problem(out: int, inner: int, tokens: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    U, s, Vh = torch.linalg.svd(draw(out, inner).double(), full_matrices=False)
    x = draw(*tokens, inner).requires_grad_()
    gates = draw(len(s)).float().double().requires_grad_()
    return x, draw(out, inner), draw(out), U.to(dtype), s, Vh.to(dtype), gates


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_gradcheck_in_float64(backend: str, shape: tuple[int, int]) -> None:
    x, weight, bias, U, s, Vh, gates = problem(*shape, (2, 3), 0)

    def forward(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return BACKENDS[backend].apply(x, weight, bias, U, 0.7 * gates.sigmoid() * s, Vh)

    assert torch.autograd.gradcheck(forward, (x, gates))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([(4,), (1, 5), (2, 3)]), st.integers(0, 9999))
def test_both_backends_agree_with_plain_autograd(out: int, inner: int, tokens: tuple[int, ...], seed: int) -> None:
    results = []
    for function in (gated_naive, FactoredProjection.apply, RebuiltProjection.apply):
        x, weight, bias, U, s, Vh, gates = problem(out, inner, tokens, seed)
        y = function(x, weight, bias, U, gates.sigmoid() * s, Vh)
        (y * torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)).sum().backward()
        results.append((y.detach(), x.grad, gates.grad))
    for other in results[1:]:
        for expected, found in zip(results[0], other, strict=True):
            assert torch.allclose(expected, found, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_gradient_stays_close_to_float64(backend: str) -> None:
    x, weight, bias, U, s, Vh, gates = problem(24, 16, (64,), 3)
    gated_naive(x, weight, bias, U, gates.sigmoid() * s, Vh).square().sum().backward()
    low = [t.detach().bfloat16() for t in (x, weight, bias, U, Vh)]
    gates32 = gates.detach().float().requires_grad_()
    y = BACKENDS[backend].apply(*low[:4], gates32.sigmoid() * s.float(), low[4])
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert gates32.grad is not None and gates32.grad.dtype == torch.float32
    assert torch.cosine_similarity(gates32.grad.double(), gates.grad, dim=0) > 0.995


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


def test_backend_choice_follows_tokens_and_rank() -> None:
    for hidden, break_even in ((2048, 1600), (3584, 2800), (5120, 4000)):
        assert choose_backend(int(0.9 * break_even), (hidden, hidden), hidden) == "factored"
        assert choose_backend(int(1.1 * break_even), (hidden, hidden), hidden) == "rebuilt"
    assert choose_backend(100_000, (2048, 2048), 256) == "factored"
    assert choose_backend(4096, (2048, 2048), 2048, "factored") == "factored"
