"""Reading answers: a table of what models write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmgraft.evaluation.answers import final_answer, same_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("17", "17"),
        ("  red blue \n", "red blue"),
        ("<think> 4 + 5 = 9 </think> 9", "9"),
        ("<think> a </think> 1 <think> b </think> 2", "2"),
        ("4 + 5 = 9 </think> 9", "9"),  # the template opened the reasoning
        ("<think> 4 + 5 = 9 ; 9 +", ""),  # cut at the token limit
        ("<think> 4 </think>", ""),
        (r"so \boxed{12}", "12"),
        (r"first \boxed{3}, no, \boxed{4} it is", "4"),
        (r"<think> \boxed{3} </think> \boxed{5}", "5"),
        ("We add.\nAnswer: 21", "21"),
        ("answer: 3\nFinal answer: 4", "4"),
        ("The sum.\nThe end", "The sum.\nThe end"),
        (r"Answer: 3, or \boxed{4}", "4"),
        ("", ""),
    ],
)
def test_final_answer(text: str, expected: str) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("said", "expected", "same"),
    [
        ("17", "17", True),
        ("17.0", "17", True),
        ("1,700", "1700", True),
        ("+5", "5", True),
        ("17", "18", False),
        ("-5", "5", False),
        ("Red  Blue.", "red blue", True),
        ("red", "red blue", False),
        ("blue red", "red blue", False),
        ("$12$", "12", True),
        ("", "17", False),
        ("", "", False),
        ("17 18", "17", False),
        ("1 2 3 4", "1 2 3 4", True),
    ],
)
def test_same_answer(said: str, expected: str, same: bool) -> None:
    assert same_answer(said, expected) is same
    assert same_answer(expected, said) is same


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_numbers_compare_by_value(one: int, other: int) -> None:
    assert same_answer(f"{one}.0", f" {other:,} ") is (one == other)


@given(st.text(), st.text(alphabet=st.characters(blacklist_characters="\\<>:=", blacklist_categories=("Cs",))))
def test_reasoning_never_leaks_into_the_answer(thought: str, answer: str) -> None:
    if "answer" not in answer.lower():
        assert final_answer(f"<think>{thought}</think>{answer}") == answer.strip()
