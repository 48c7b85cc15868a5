"""One number with its unit, read exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from vlmgraft.evaluation.answers.quantities import leading_quantity, read_quantity, same_quantity, without_unit

numbers = st.decimals(-(10**6), 10**6, allow_nan=False, places=2).map(lambda number: f"{number:f}")


@given(st.integers(-(10**9), 10**9), st.integers(0, 4))
def test_writings_of_one_number_are_the_same(number: int, zeros: int) -> None:
    forms = [
        f"{number}",
        f"{number:,}",
        f"{number}.{'0' * zeros}",
        f"{number}e0",
        f"\\frac{{{number}}}{{1}}",
        f"{number}/1",
    ]
    forms += [f"{number:,} apples", f"x = {number}", f"{number:+d}", str(number).replace("-", "−")]
    for form in forms:
        found, expected = read_quantity(form), read_quantity(str(number))
        assert found is not None and expected is not None and same_quantity(found, expected), form


@given(st.fractions(max_denominator=999).filter(lambda fraction: abs(fraction) < 10**6))
def test_fractions_are_read_exactly(fraction: object) -> None:
    found = read_quantity(str(fraction))
    assert found is not None and found.value == fraction


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("1 hour and 30 minutes", "3/2", "hour"),
        ("an hour and a half", "3/2", "hour"),
        ("2 h, 5 min and 6 s", "7506/3600", "h"),
        ("3 dollars and 50 cents", "7/2", "dollars"),
        ("5 feet 6 inches", "11/2", "feet"),
        ("a dozen eggs", "12", "eggs"),
        ("two and a half hours", "5/2", "hours"),
        ("3 to 5", "3/5", ""),
        ("1,234.5 km", "2469/2", "km"),
        ("25 square metres", "25", "metres^2"),
        ("$1.2 \\times 10^3$", "1200", ""),
    ],
)
def test_what_a_quantity_is(text: str, value: str, unit: str) -> None:
    found = read_quantity(text)
    assert found is not None and (found.value, found.unit) == (Fraction(value), unit)


@pytest.mark.parametrize(
    "text", ["17 or 18", "8 + 9", "3x", "1/0", "30 minutes and 1 hour", "3 dollars and 50 minutes", "", "1 and 2"]
)
def test_what_is_no_quantity(text: str) -> None:
    assert read_quantity(text) is None


@pytest.mark.parametrize(
    ("said", "expected", "same"),
    [
        ("19:45", "7:45 PM", True),
        ("7:45 p.m.", "19:45", True),
        ("7:45", "7:45 PM", True),
        ("12:05 am", "0:05", True),
        ("half past three", "3:30", True),
        ("9 o'clock", "9:00", True),
        ("9 pm", "21:00", True),
        ("7:45 AM", "19:45", False),
        ("7:45 AM", "7:45 PM", False),
        ("5:10", "6:12", False),  # the same ratio, another minute
        ("6:10", "3:5", True),
        ("90 minutes", "1.5 hours", True),
        ("25¢", "$0.25", True),
        ("5 in", "5 inches", True),
        ("3", "3 cm", True),
        ("3 kg", "3 cm", False),
    ],
)
def test_one_quantity_in_two_writings(said: str, expected: str, same: bool) -> None:
    one, other = read_quantity(said), read_quantity(expected)
    assert one is not None and other is not None
    assert same_quantity(one, other) is same


@given(st.integers(0, 23), st.integers(0, 59))
def test_a_time_of_day_in_twelve_and_in_twenty_four_hours(hour: int, minute: int) -> None:
    half, other = ("pm", "am") if hour >= 12 else ("am", "pm")
    clock = read_quantity(f"{hour}:{minute:02d}")
    here, there = (read_quantity(f"{hour % 12 or 12}:{minute:02d} {mark}") for mark in (half, other))
    assert clock is not None and here is not None and there is not None
    assert same_quantity(here, clock) and not same_quantity(here, there)


def test_the_number_that_a_text_begins_with_has_a_known_unit_or_none() -> None:
    found, bare = leading_quantity("18.6 cm to two decimal places"), leading_quantity("3 in the picture")
    assert found is not None and (found.value, found.unit) == (Fraction("18.6"), "cm")
    assert bare is not None and bare.unit == ""
    assert leading_quantity("2 × 3 × 5") is None and without_unit("36\\pi cm^3") == "36\\pi"
