"""Cleaning short texts before they are compared."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, strategies as st

from vlmgraft.evaluation.answers.quantities import read_quantity
from vlmgraft.evaluation.answers.text import key, plain, split_outside, squeeze, unwrap
from vlmgraft.evaluation.answers.values import same_value


@given(st.text(max_size=80))
def test_cleaning_settles(text: str) -> None:
    once = plain(text)
    assert plain(once) == once


@given(st.text(alphabet="0123456789.,+-/*^_{}()\\$%= abxπ°", max_size=25))
def test_nothing_that_looks_like_mathematics_breaks_the_reader(said: str) -> None:
    read_quantity(said)
    assert unwrap(unwrap(said)) is not None and key(said) is not None
    assert same_value(said, said) is bool(key(said))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("**B**", "B"),
        ("$\\text{ cm }$", "cm"),
        ("\\frac12^\\circ", "\\frac12°"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("3\\,\\mathrm{A}", "3 A"),
        ("5\\%", "5%"),
        ("`x`", "x"),
    ],
)
def test_what_only_sets_type_goes(text: str, cleaned: str) -> None:
    assert unwrap(text) == cleaned


def test_keys_squeezing_and_splitting() -> None:
    assert key(" (The Cat.) ") == "the cat" and key("“Yes!”") == "yes"
    assert squeeze("a  b \n\n c") == "a b\nc"
    assert plain("m² − 3") == "m^2 - 3"
    assert split_outside("(1,2),3", re.compile(",")) == ["(1,2)", "3"]
