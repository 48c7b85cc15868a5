"""Texts for people: numbers with few digits, sentences, and nothing that HTML would take for its own."""

from __future__ import annotations

import math

import pytest

from vlmgraft.report.text import attributes, escape, number, sentence


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (-12.3456, "−12.3"), (0, "0"), (1e-6, "1.00e-6"), (12345.6, "12,346"), (None, "–"), (math.nan, "–")],
)
def test_numbers_for_people(value: float | None, text: str) -> None:
    assert number(value) == text


def test_sentences() -> None:
    assert sentence("a Folder is") == "A Folder is."
    assert sentence("τ is short.") == "Τ is short." and sentence("") == "."


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.123456, 2, "0.12"), (99.96, 3, "100"), (1e6, 3, "1.00e6"), (2e-5, 2, "2.0e-5"), (-250_000.0, 2, "−250,000")],
)
def test_digits_are_significant_ones(value: float, digits: int, text: str) -> None:
    assert number(value, digits) == text


def test_what_html_would_take_for_its_own_is_escaped() -> None:
    assert escape("<a href=\"x\">'&'") == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;&#x27;"
    assert attributes({"method": 'a"b', "band": "1 < 2"}) == ' data-method="a&quot;b" data-band="1 &lt; 2"'
    assert attributes({}) == ""
