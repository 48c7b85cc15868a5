"""Bounds on the KL of unseen prompts: against plain twins, and their coverage on a heavy-tailed distribution."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import binom

from vlmgraft.distillation.risk_control import Certified, betting_bound, certify, conformal_bound
from vlmgraft.errors import NumericalError

LEVEL, CAP, DRAWS, PROMPTS = 0.9, 1.0, 250, 80
PATH = [place / 20 for place in range(1, 21)]
DIVERGENCES = st.lists(st.floats(0, 2), min_size=1, max_size=30)


def naive_betting_bound(divergences: list[float], cap: float, level: float, steps: int) -> float:
    """The smallest of the means m = 1/steps, 2/steps, … whose bettors reach 1/δ; products of plain floats."""
    for m in (step / steps for step in range(1, steps)):
        capital = 0.0
        for bet in (0.25, 0.5, 0.9):
            won = 1.0
            for kl in divergences:
                won *= 1 - bet * (min(kl / cap, 1.0) - m) / (1 - m)
            capital += won / 3
        if capital >= 1 / (1 - level):
            return m * cap
    return cap


@settings(max_examples=60, deadline=None)
@given(DIVERGENCES, st.floats(0.1, 3), st.floats(0.5, 0.99))
def test_the_betting_bound_is_its_naive_twin(divergences: list[float], cap: float, level: float) -> None:
    steps = 400
    naive = naive_betting_bound(divergences, cap, level, steps)
    assert naive - cap / steps - 1e-9 <= betting_bound(divergences, cap, level) <= naive + 1e-9


@settings(max_examples=50, deadline=None)
@given(DIVERGENCES, st.floats(0.1, 3), st.floats(0.01, 100))
def test_bounds_lie_within_the_cap_and_have_the_divergences_unit(
    divergences: list[float], cap: float, unit: float
) -> None:
    scaled = [unit * kl for kl in divergences]
    for bound in (conformal_bound, partial(betting_bound, level=LEVEL)):
        assert 0 < bound(divergences, cap) <= cap + 1e-12
        assert bound(scaled, unit * cap) == pytest.approx(unit * bound(divergences, cap))
        assert bound(sorted(divergences), cap) == pytest.approx(bound(divergences, cap)), (
            "batches sort prompts by length"
        )


def test_bounds_by_hand() -> None:
    """Conformal: (0 + 0.2 + 1 + 1)/4. Betting, one KL of 0, δ = ½, mean bet 0.55: 1 + 0.55·m/(1 − m) = 2."""
    assert conformal_bound([0.0, 0.2, 7.0], 1.0) == pytest.approx(0.55)
    assert betting_bound([0.0], 2.0, 0.5) == pytest.approx(2 / 1.55)
    assert betting_bound(np.full(50, 3.0), 2.0, 0.9) == 2.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=5, max_size=20), st.floats(0.05, 1))
def test_the_last_scaling_that_passes(heights: list[float], budget: float) -> None:
    """With divergences t²·h the answer is the largest t of the path within the budget, and the next is above it."""
    asked = []

    def divergences(t: float) -> Any:
        asked.append(t)
        return [t * t * height for height in heights]

    result = certify(divergences, PATH, budget, CAP, conformal_bound)
    within = [t for t in PATH if conformal_bound(np.square(t) * np.array(heights), CAP) <= budget]
    assert result.t == max(within, default=0.0) and result.bound <= budget
    assert asked == PATH[: len(within) + 1], "nothing is measured beyond the first failure"


def test_a_kl_that_falls_again_counts_as_its_maximum() -> None:
    steps = {0.5: [0.0, 0.4], 1.0: [0.4, 0.0]}
    assert certify(steps.__getitem__, steps, 0.65, CAP, conformal_bound) == Certified(1.0, 0.6, 0.4, 0.0)
    assert certify(steps.__getitem__, steps, 0.55, CAP, conformal_bound).t == 0.5
    assert certify(steps.__getitem__, steps, 0.1, CAP, conformal_bound) == Certified()


def test_the_share_at_the_cap_is_told() -> None:
    assert certify(lambda _: [0.0, 3.0, 9.0, 0.0], [1.0], 1.0, CAP, conformal_bound).clipped == 0.5


@pytest.mark.parametrize("divergences", [[], [0.1, math.nan], [[0.1]]])
def test_what_is_no_kl_is_refused(divergences: Any) -> None:
    with pytest.raises(NumericalError, match="one number per prompt"):
        conformal_bound(divergences, CAP)


def pareto(draws: int, prompts: int, seed: int) -> np.ndarray:
    """Draws × prompts of a Pareto distribution with index 3/2 above 0.02: its variance is infinite."""
    return 0.02 * np.random.default_rng(seed).random((draws, prompts)) ** (-2 / 3)


def clipped_mean(t: float) -> float:
    """E min(t²·X, 1) = a·(3 − 2√a) with a = 0.02·t², by integrating the tail probability."""
    a = 0.02 * t * t
    return a * (3 - 2 * math.sqrt(a))


def test_the_betting_bound_covers_the_mean() -> None:
    """Misses are binomial with probability δ at most; a count above its 99.9 % quantile would refute the level."""
    bounds = np.array([betting_bound(divergences, CAP, LEVEL) for divergences in pareto(DRAWS, PROMPTS, 0)])
    assert (bounds < clipped_mean(1.0)).sum() <= binom.ppf(0.999, DRAWS, 1 - LEVEL)
    hoeffding = clipped_mean(1.0) + math.sqrt(math.log(10) / (2 * PROMPTS))
    assert clipped_mean(1.0) < np.median(bounds) < 0.75 * hoeffding, "a bound that says nothing would cover, too"


def test_certified_gates_are_within_the_budget_as_often_as_the_level_says() -> None:
    budget, bound = 0.05, partial(betting_bound, level=LEVEL)
    results = [
        certify(lambda t, x=divergences: t * t * x, PATH[9:], budget, 0.5, bound).t
        for divergences in pareto(DRAWS, PROMPTS, 1)
    ]
    exceeded = sum(np.array([clipped_at_half(t) for t in results]) > budget)
    assert exceeded <= binom.ppf(0.999, DRAWS, 1 - LEVEL)
    assert np.median(results) > 0.5, "closed gates would be within every budget"


def clipped_at_half(t: float) -> float:
    """E min(t²·X, ½) = a·(3 − 2√(2a)) with a = 0.02·t²."""
    a = 0.02 * t * t
    return a * (3 - 2 * math.sqrt(2 * a))


def test_conformal_risk_control_holds_on_average_and_is_tight() -> None:
    """Theorem 1: the mean is within the budget; it is above budget − 2c/(n + 1) − one step of the path (theorem 2)."""
    budget, path = 0.05, [place / 100 for place in range(30, 101)]
    risks = [
        clipped_mean(certify(lambda t, x=divergences: t * t * x, path, budget, CAP, conformal_bound).t)
        for divergences in pareto(DRAWS, PROMPTS, 2)
    ]
    error = np.std(risks) / math.sqrt(DRAWS)
    assert budget - 2 * CAP / (PROMPTS + 1) - 0.02 * budget - 3 * error < np.mean(risks) <= budget + 3 * error
