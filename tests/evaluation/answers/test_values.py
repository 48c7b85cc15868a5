"""What a text states, and whether two short answers are one."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from vlmgraft.evaluation.answers.values import mathematical, same_value, stated_number, yes_or_no


@given(st.lists(st.integers(0, 99), min_size=2, max_size=6, unique=True), st.randoms())
def test_lists_in_brackets_have_an_order_and_others_have_none(numbers: list[int], random: object) -> None:
    turned = [*numbers[1:], numbers[0]]
    bare, other = ", ".join(map(str, numbers)), ", ".join(map(str, turned))
    assert same_value(bare, bare) and same_value(other, bare) and not same_value(f"({other})", f"({bare})")
    assert not same_value(", ".join(map(str, numbers[:-1])), bare)


@pytest.mark.parametrize(
    ("said", "expected", "same"),
    [
        ("x > 3", "(3,\\infty)", True),
        ("x \\geq 3", "(3,\\infty)", False),
        ("-1 < x \\le 4", "(-1, 4]", True),
        ("(3,\\infty)", "x > 3", True),
        ("x < 3", "(3,\\infty)", False),
        ("x < -1 or x > 2", "(-\\infty,-1)\\cup(2,\\infty)", True),
        ("$2^{3}$", "8", True),
        ("\\pm 2", "2, -2", True),
        ("100, 200", "100,200", True),
        ("the cat", "Cat", True),
        ("3 + 5", "8", False),
        ("", "", False),
    ],
)
def test_two_short_answers(said: str, expected: str, same: bool) -> None:
    assert same_value(said, expected) is same


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("There are no cubes left.", "0"),
        ("There are half a dozen eggs.", "6"),
        ("There are no right angles, but there are 3 acute angles.", "3"),
        ("The film runs for 1 hr 45 min.", "7/4"),
        ("There are a thousand bricks.", "1000"),
        ("Two thirds of the pie is left.", "2/3"),
        ("图中有5个苹果。", "5"),
        ("He ate 1 1/2 pies.", "3/2"),
        ("The speed is 5 when x = 2.", "5"),
        ("It sold $20.4 million.", "20400000"),
        ("It is 4 or 5.", None),
        ("17 18", None),
    ],
)
def test_the_number_that_a_text_states(text: str, value: str | None) -> None:
    found = stated_number(text)
    assert (found and found.value) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    ("text", "stance"),
    [
        ("Yes, two.", True),
        ("Definitely!", True),
        ("The statement is false.", False),
        ("There is no dog.", False),
        ("否", False),
        ("Yes and no.", None),
        ("I am not sure.", None),
        ("A dog", None),
    ],
)
def test_a_stance(text: str, stance: bool | None) -> None:
    assert yes_or_no(text) is stance


def test_words_are_no_mathematics() -> None:
    assert (
        mathematical("3x + 1") and mathematical("\\sin x") and not mathematical("two cats") and not mathematical("ab")
    )
