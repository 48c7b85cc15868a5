"""Units: names, and factors between them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from vlmgraft.evaluation.answers.units import UNITS, conversion, known, unit_of


@given(st.sampled_from(sorted(UNITS)), st.sampled_from(sorted(UNITS)))
def test_a_factor_there_and_back_is_one(one: str, other: str) -> None:
    there, back = conversion(one, other), conversion(other, one)
    assert (there is None) == (back is None) == (UNITS[one][0] != UNITS[other][0])
    assert there is None or back is None or there * back == 1


@pytest.mark.parametrize(
    ("unit", "wanted", "factor"),
    [
        ("km/h", "m/s", "5/18"),
        ("cm^2", "m^2", "1/10000"),
        ("hours", "min", "60"),
        ("cents", "$", "1/100"),
        ("apples", "apple", "1"),
        ("m", "m^2", None),
        ("m", "kg", None),
        ("apples", "pears", None),
    ],
)
def test_factors(unit: str, wanted: str, factor: str | None) -> None:
    assert conversion(unit, wanted) == (None if factor is None else Fraction(factor))


def test_what_stands_behind_a_number() -> None:
    assert unit_of("square metres") == "metres^2" and unit_of("per cent") == "%" and unit_of("units") == ""
    assert unit_of("or") is None and unit_of("of the 9") is None and known("hours") and not known("cats")
