"""Bootstrap intervals: they bracket the mean, narrow with n, cover the truth about 95 % of the time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from vlmgraft.evaluation.intervals import Estimate, bootstrap, score_interval


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=4))
def test_mean_of_group_means_lies_inside(groups: list[list[bool]]) -> None:
    found = bootstrap(groups)
    assert found.mean == pytest.approx(np.mean([np.mean(group) for group in groups]))
    assert 0 <= found.low <= found.mean + 1e-12 and found.mean - 1e-12 <= found.high <= 1


def test_groups_count_alike_whatever_their_size() -> None:
    assert bootstrap([[1.0] * 10, [0.0] * 990]).mean == 0.5


def test_same_seed_same_interval() -> None:
    values = [np.arange(50) % 3 == 0]
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) != bootstrap(values, seed=1)


def test_width_is_that_of_the_normal_approximation() -> None:
    values = np.arange(400) % 4 == 0
    found = bootstrap([values])
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 * 0.75 / 400), rel=0.1)


def test_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = bootstrap([rng.random(80) < 0.6])
        covered += found.low <= 0.6 <= found.high
    assert 178 <= covered <= 198  # 190 expected, standard deviation 3


def test_differences_without_spread_have_no_width() -> None:
    assert bootstrap([[0.0, 0.0, 0.0]]) == Estimate(0.0, 0.0, 0.0)


@pytest.mark.parametrize("count", [1, 20, 400])
def test_all_right_or_none_has_wilsons_interval(count: int) -> None:
    """Of n right answers of n Wilson's lower end is n / (n + z²), z = 1.96; of none the upper end is its complement."""
    lower = count / (count + 1.959964**2)
    right, wrong = score_interval([[1.0] * count]), score_interval([[0.0] * count])
    assert (right.mean, right.low, right.high) == pytest.approx((1, lower, 1), abs=1e-6)
    assert (wrong.mean, wrong.low, wrong.high) == pytest.approx((0, 0, 1 - lower), abs=1e-6)


def test_constant_groups_average_their_intervals() -> None:
    lower = 20 / (20 + 1.959964**2)
    found = score_interval([[1.0] * 20, [0.0] * 20])
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, lower / 2, (2 - lower) / 2), abs=1e-6)
    assert score_interval([[0.5, 0.5]]) == Estimate(0.5, 0.5, 0.5), "partial scores are no successes"
    mixed = [[1.0, 0.0, 1.0], [1.0, 1.0]]
    assert score_interval(mixed) == bootstrap(mixed)


@pytest.mark.parametrize("groups", [[], [[]], [[1.0], []]])
def test_without_values_there_is_no_estimate(groups: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap(groups)


def test_percent() -> None:
    assert Estimate(0.7266, 0.691, 0.7619).percent() == "72.7 [69.1, 76.2]"
