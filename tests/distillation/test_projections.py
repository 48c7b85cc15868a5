"""The arithmetic of gated projections: both backends against plain autograd in float64, and the choice between them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vlmgraft.distillation.projections import (
    FactoredProjection,
    RebuiltProjection,
    RebuiltStack,
    choose_backend,
    gated_naive,
)

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


def test_backend_choice_follows_tokens_and_rank() -> None:
    for hidden, break_even in ((2048, 1600), (3584, 2800), (5120, 4000)):
        assert choose_backend(int(0.9 * break_even), (hidden, hidden), hidden) == "factored"
        assert choose_backend(int(1.1 * break_even), (hidden, hidden), hidden) == "rebuilt"
    assert choose_backend(100_000, (2048, 2048), 256) == "factored"
    assert choose_backend(4096, (2048, 2048), 2048, "factored") == "factored"


def test_the_backend_with_fewer_operations_is_taken() -> None:
    """100 × 300 at rank 75: products on T tokens cost 4T·75·400 − 2T·30,000 = 60,000 T more, the rebuild
    1.2·4·30,000·75 = 10.8 million: equal at 180."""
    for shape in ((100, 300), (300, 100)):
        assert choose_backend(180, shape, 75) == "factored" and choose_backend(181, shape, 75) == "rebuilt"
    assert choose_backend(10**9, (100, 300), 37) == "factored", "at 2r(m + n) ≤ mn products are always cheaper"
    assert choose_backend(1, (100, 300), 75, "rebuilt") == "rebuilt"


def test_a_stack_is_its_experts_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, U, Vh = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 5, 4), (3, 5, 2), (3, 2, 4))
    )
    spectrum = torch.rand(3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    stack = RebuiltStack.apply(weight, U, spectrum, Vh)
    for expert in range(3):
        assert torch.allclose(stack[expert], weight[expert] + U[expert] @ spectrum[expert].diag() @ Vh[expert])
    assert torch.autograd.gradcheck(lambda s: RebuiltStack.apply(weight, U, s, Vh), (spectrum,))
