"""The budget of KL divergence: the controller's arithmetic, its behaviour in a loop, and the search after training."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from vlmgraft.distillation.budget import BudgetControl, FixedWeight, Rotation, largest_within


def test_the_weight_answers_the_error_at_once_and_adds_it_up() -> None:
    """log α = log α₀ + integral + 2e with e = log(budget / KL); the integral takes 0.2 e at every step."""
    control = BudgetControl(0.01, 0.1)
    assert control.weight == 0.1
    control.observe(0.02)
    assert control.weight == pytest.approx(0.1 * 0.5**2)
    control.step()
    control.step()
    assert control.weight == pytest.approx(0.1 * 0.5**2.4)
    control.observe(0.01)
    assert control.weight == pytest.approx(0.1 * 0.5**0.4), "without an error the integral alone remains"
    control.observe(0.005)
    control.step()
    assert control.weight == pytest.approx(0.1 * 0.5 ** (0.4 - 0.2 - 2))
    assert BudgetControl(0.01, 0.1, **control.state()) == control


@pytest.mark.parametrize(("kl", "sign"), [(1e6, -1), (0.0, 1), (1e-40, 1)])
def test_one_measurement_moves_the_weight_by_e_squared_at_most(kl: float, sign: int) -> None:
    control = BudgetControl(0.01, 0.1)
    control.observe(kl)
    assert control.weight == pytest.approx(0.1 * math.exp(2 * sign))


@pytest.mark.parametrize(("kl", "sign"), [(1.0, -1), (1e-9, 1)])
def test_the_integral_stops_at_a_factor_of_a_thousand(kl: float, sign: int) -> None:
    control = BudgetControl(0.01, 0.1)
    for _ in range(34):
        control.observe(kl)
        control.step()
    assert abs(control.integral) == pytest.approx(34 * 0.2)
    for _ in range(100):
        control.step()
    control.observe(0.01)
    assert control.weight == pytest.approx(0.1 * 1000.0**sign)


def test_a_fixed_weight_is_fixed() -> None:
    fixed = FixedWeight(0.3)
    fixed.step()
    assert fixed.weight == 0.3 and fixed.state() == {}


@pytest.mark.parametrize("slope", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("first", [0.001, 0.5])
def test_control_settles_on_the_budget_without_winding_up(slope: float, first: float) -> None:
    """A KL that follows log α with a lag: the control must end within 10 % of the budget."""
    control, log_kl = BudgetControl(0.01, 1.0), math.log(first)
    for _ in range(150):
        control.observe(math.exp(log_kl))
        log_kl += 0.15 * (math.log(0.005) + slope * math.log(control.weight) - log_kl)
        control.step()
    assert math.exp(log_kl) == pytest.approx(0.01, rel=0.1)
    for _ in range(10_000):
        control.observe(1e-9)
        control.step()
    assert math.isfinite(control.weight) and control.weight < 1e4


@given(
    slope=st.floats(0.2, 4.0), bend=st.floats(0.0, 0.2), at=st.floats(-11.0, 11.0), end=st.floats(1.0, 12.0)
)  # fmt: skip
def test_the_largest_within_a_budget_is_found_in_few_measurements(
    slope: float, bend: float, at: float, end: float
) -> None:
    seen: list[float] = []

    def kl_at(x: float) -> float:
        seen.append(x)
        return 0.01 * math.exp(slope * (x - at) + bend * (math.tanh(x) - math.tanh(at)))

    x, kl = largest_within(kl_at, 0.01, -12.0, end)
    assert kl == pytest.approx(kl_at(x)) and kl <= 0.01 and -12 <= x <= end
    assert x == end or kl >= 0.0097 * 0.999
    assert len(seen) <= 9 and all(-12 <= each <= end for each in seen)


def test_a_divergence_that_overflows_or_never_fits_is_met_from_below() -> None:
    x, kl = largest_within(lambda x: math.nan if x > -1 else math.exp(x), 0.1, -12.0, 12.0)
    assert 0.097 <= kl <= 0.1 and x == pytest.approx(math.log(kl))
    assert largest_within(lambda x: 5.0 + x / 100, 1.0, -12.0, 12.0)[0] == -12


def test_the_search_starts_at_zero_and_stops_where_the_tolerance_allows() -> None:
    """Already between 97 % and 100 % of the budget: one measurement. Just below 97 %: it goes on and opens further."""
    seen: list[float] = []

    def kl_at(x: float, start: float) -> float:
        seen.append(x)
        return start * math.exp(x)

    assert largest_within(lambda x: kl_at(x, 0.975), 1.0, -12.0, 12.0) == (0.0, 0.975) and seen == [0.0]
    seen.clear()
    x, kl = largest_within(lambda x: kl_at(x, 0.96), 1.0, -12.0, 12.0)
    assert x > 0 and 0.97 <= kl <= 1 and seen[0] == 0.0 and len(seen) > 1


def test_the_ends_are_measured_and_returned() -> None:
    assert largest_within(lambda x: 1e-6 * (13 + x), 1.0, -12.0, 12.0) == (12.0, pytest.approx(25e-6))
    x, kl = largest_within(lambda x: 5.0 + x / 100, 1.0, -12.0, 12.0)
    assert (x, kl) == (-12.0, pytest.approx(4.88)), "the KL of the lower end, although it exceeds the budget"


def test_a_part_stands_for_all_prompts_by_what_it_was_to_them_at_first() -> None:
    """Parts of 10, 30 and 60 tokens whose KL is 1, 2 and 4 times a common one: it is seen exactly from any of them."""
    tokens, difficulty = [10, 30, 60], [1.0, 2.0, 4.0]
    average = (10 * 1 + 30 * 2 + 60 * 4) / 100
    measured: list[int] = []

    def measure_at(common: float) -> float:
        return rotation.observe(lambda part: measured.append(part) or common * difficulty[part])  # type: ignore[func-returns-value]

    rotation = Rotation(tokens)
    for common in (0.01, 0.02, 0.005, 0.03, 0.004):
        assert measure_at(common) == pytest.approx(common * average)
    assert measured == [0, 1, 2, 0, 1, 2, 0], "all at first, then one after the other"
    again = Rotation(tokens, **rotation.state())  # type: ignore[arg-type]
    assert again == rotation and again.observe(lambda part: 7.0 * (part == 1)) == pytest.approx(7 * average / 2)


def test_a_part_that_was_nearly_nothing_at_first_does_not_blow_up() -> None:
    rotation = Rotation([50, 50], [1e-12, 0.1], 1)
    assert rotation.observe(lambda _: 0.01) == pytest.approx(0.04), "corrected by a factor of four at most"
    assert Rotation([50, 50], [0.1, 1e-12], 1).observe(lambda _: 0.01) == pytest.approx(0.005)
    assert Rotation([50, 50], [1.0, 1e-12], 2).observe(lambda _: 0.01) == pytest.approx(0.04)


def test_one_part_is_measured_as_it_is() -> None:
    rotation = Rotation([7])
    assert [rotation.observe(lambda _, kl=kl: kl) for kl in (0.3, 0.1, 0.2)] == [0.3, 0.1, 0.2]
