"""Number words as digits."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from vlmgraft.evaluation.answers.words import in_digits


@pytest.mark.parametrize(
    ("text", "digits"),
    [
        ("seven", "7"),
        ("Twenty-three cats", "23 cats"),
        ("one hundred and five", "105"),
        ("a hundred people", "100 people"),
        ("two thirds", "2/3"),
        ("a quarter of it", "1/4 of it"),
        ("half", "1/2"),
        ("two and a half hours", "2 1/2 hours"),
        ("half a dozen eggs", "6 eggs"),
        ("3 dozen", "36"),
        ("a pair of birds", "2 birds"),
        ("half past three", "3:30"),
        ("a quarter to four", "3:45"),
        ("9 o'clock", "9:00"),
        ("third", "3th"),
        ("a cat", "a cat"),
        ("Ten", "10"),
        ("tennis", "tennis"),
    ],
)
def test_number_words(text: str, digits: str) -> None:
    assert in_digits(text, whole=True).strip().replace("  ", " ") == digits


@given(st.text(max_size=40))
def test_texts_without_number_words_stay(text: str) -> None:
    once = in_digits(text, whole=False)
    assert once == text or once[:1].isdigit()
