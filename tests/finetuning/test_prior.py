"""DRIFT's push against hand-computed cases, against its naive twin, and its schedules."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from tests.finetuning.naive_push import pushed
from vlmgraft.errors import RecipeError
from vlmgraft.finetuning.prior import Mode, PushRule, cosine, push_length

GRAD, DELTA = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])  # ‖g‖ = 5, cos = 0.8


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (PushRule("absolute", 1.0), [3.0, 2.0]),  # 4 − 2
        (PushRule("absolute", 0.5), [3.0, 3.0]),
        (PushRule("absolute", 1.0, rescale=True), [3.0, -9.0]),  # Δ at the parameter's norm 13: 4 − 13
        (PushRule("grad_norm", 1.0), [3.0, -1.0]),  # 4 − 5
        (PushRule("grad_norm", 2.0), [3.0, -6.0]),
        (PushRule("adaptive", 1.0), [3.0, -0.5]),  # 4 − 0.9·5
        (PushRule("adaptive", 2.0), [3.0, -5.0]),
    ],
)
def test_hand_computed_cases(rule: PushRule, expected: list[float]) -> None:
    assert pushed(GRAD, DELTA, rule, torch.tensor([5.0, 12.0])).tolist() == pytest.approx(expected)


def test_adaptive_is_full_against_the_donor_and_nothing_along_it() -> None:
    rule = PushRule("adaptive", 1.0)
    against, along = pushed(DELTA, DELTA, rule), pushed(-DELTA, DELTA, rule)  # −g is where the optimiser goes
    assert against.tolist() == pytest.approx([0.0, 0.0])  # a step of −g away from the donor is cancelled
    assert along.tolist() == pytest.approx((-DELTA).tolist())  # a step towards the donor is left alone


def naive_and_fast(grad: Tensor, delta: Tensor, mode: Any, strength: float) -> tuple[Tensor, Tensor]:
    sizes = grad.norm(), (grad * delta).sum(), delta.norm()
    length = push_length(mode, strength, *sizes, target_norm=delta.norm())
    unit = delta / sizes[2] if sizes[2] > 0 else delta
    return pushed(grad, delta, PushRule(mode, strength)), grad - length * unit


@given(st.integers(0, 10**6), st.sampled_from(get_args(Mode)), st.floats(0, 5), st.floats(1e-4, 1e4))
def test_the_fast_form_is_the_naive_one(seed: int, mode: Any, strength: float, size: float) -> None:
    torch.manual_seed(seed)
    grad, delta = torch.randn(2, 7, 5, dtype=torch.float64).unbind()
    naive, fast = naive_and_fast(size * grad, delta, mode, strength)
    assert torch.allclose(naive, fast, rtol=1e-9, atol=1e-9 * size)


@given(st.integers(0, 10**6), st.sampled_from(["grad_norm", "adaptive"]), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_scaled_gradients_and_priors(seed: int, mode: Any, loss_scale: float, delta_scale: float) -> None:
    """The normalised modes commute with a loss scale, and Δ's length plays no part in them."""
    torch.manual_seed(seed)
    grad, delta = torch.randn(2, 6, dtype=torch.float64).unbind()
    rule = PushRule(mode, 0.7)
    expected = loss_scale * pushed(grad, delta, rule)
    assert torch.allclose(pushed(loss_scale * grad, delta_scale * delta, rule), expected, rtol=1e-8, atol=1e-12)


@given(st.integers(0, 10**6), st.sampled_from(get_args(Mode)), st.floats(0.01, 5))
def test_a_push_never_lowers_the_way_to_the_donor(seed: int, mode: Any, strength: float) -> None:
    torch.manual_seed(seed)
    grad, delta = torch.randn(2, 6, dtype=torch.float64).unbind()
    moved = -(pushed(grad, delta, PushRule(mode, strength)) * delta).sum()
    assert moved >= -(grad * delta).sum() - 1e-9


def test_zero_gradient_zero_prior_and_zero_strength_change_nothing() -> None:
    zero = torch.zeros(2)
    for mode in get_args(Mode):
        assert pushed(GRAD, zero, PushRule(mode)).equal(GRAD)
        assert pushed(GRAD, DELTA, PushRule(mode, 0.0)).equal(GRAD)
    assert pushed(zero, DELTA, PushRule("adaptive")).equal(zero)
    assert cosine(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])).tolist() == [0.0, 1.0]


def test_schedules() -> None:
    at = {name: PushRule(strength=2.0, schedule=name) for name in ("constant", "linear", "cosine")}  # type: ignore[arg-type]
    assert [at["constant"].strength_at(share) for share in (0, 0.5, 1)] == [2, 2, 2]
    assert [at["linear"].strength_at(share) for share in (0, 0.25, 1, 2)] == [2, 1.5, 0, 0]
    assert [at["cosine"].strength_at(share) for share in (0, 0.5, 1)] == pytest.approx([2, 1, 0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "adaptiv"}, "prior.mode: 'adaptiv'"),
        ({"schedule": "step"}, "prior.schedule: 'step'"),
        ({"strength": -1.0}, "prior.strength: -1.0"),
        ({"strength": float("nan")}, "prior.strength: nan"),
        ({"strength": float("inf")}, "prior.strength: inf"),
        ({"rescale": True}, "prior.rescale"),
        ({"mode": "grad_norm", "rescale": True}, "prior.rescale"),
    ],
)
def test_refused(options: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        PushRule(**options)
