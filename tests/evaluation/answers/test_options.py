"""Which choice an answer picks: by letter, by value, by text."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from vlmgraft.data.choices import lettered, letters
from vlmgraft.evaluation.answers import choices_within, judge
from vlmgraft.evaluation.answers.options import expected_letters, pick, pick_several


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("\\boxed{-4}", None),
        ("\\boxed{\\sqrt{4}}", None),
        ("Answer: 1/4", None),
        ("4.5", None),
        ("4x", None),
        ("\\boxed{\\frac{8}{2}}", "A"),
        ("\\boxed{9^\\circ}", "C"),
        ("B. It is not C, although 9 is near.", "B"),
        ("答案是C", "C"),
        ("I don't know", None),
        ("\\boxed{x > 1}\n\nAnswer: D", "D"),
    ],
)
def test_choices_are_met_by_value_or_letter(output: str, letter: str | None) -> None:
    question = "What is y?\nChoices:\nA:4\nB:7\nC:9°\nD:none"
    choices = choices_within(question)
    assert choices == ("4", "7", "9°", "none")
    assert [judge(output, each, choices).score for each in "ABCD"] == [float(each == letter) for each in "ABCD"]


def test_a_value_on_the_way_is_no_choice_where_the_end_says_that_none_fits() -> None:
    text = "The line meets x = 9 at one point.\n\nSo y is 30. The correct answer is not among the options."
    assert [judge(text, each, ("4", "7", "9")).score for each in "ABC"] == [0, 0, 0]


WORDINGS = ("{}", "**{}**", "\\boxed{{{}}}", "Answer: {}", "The answer is {}.", "<think>It may be 4 or B.</think>{}")
CHOICES = ["red", "dark blue", "12 cm", "none of these", "5"]


@given(
    st.integers(0, len(CHOICES) - 1),
    st.sampled_from(WORDINGS),
    st.sampled_from(["{0}", "({0})", "{0}.", "{0}. {1}", "option {0}", "{1}"]),
)
def test_a_right_option_stays_right(place: int, wording: str, form: str) -> None:
    letter = letters(len(CHOICES))[place]
    output = wording.format(form.format(letter, CHOICES[place]))
    for expected in (letter, CHOICES[place]):
        assert judge(output, expected, CHOICES).score == 1
    assert judge(output, letters(5)[place - 1], CHOICES).score == 0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Neither A nor B is a square whereas option D is.", "D"),
        ("A and C can be ruled out; B is the only one left.", "B"),
        ("The best choice is C rather than B.", "C"),
        ("A and B are both wrong, so C or D. I pick D.", "D"),
        ("x + 5 = 9\nx = 9 - 5\nx = 4", "C"),
        ("Either A or B.", None),
        ("故选：B。", "B"),
    ],
)
def test_a_letter_in_prose(text: str, letter: str | None) -> None:
    assert pick(text, ("9", "5", "4", "none")) == letter


def test_several_letters_and_lettered_lists() -> None:
    assert pick_several("A and C", ("a", "b", "c")) == {"A", "C"} == pick_several("AC", ("a", "b", "c"))
    assert lettered("A. 3; B. 4; C. 5") == ("3", "4", "5") and lettered("B. 3; D. 4") == ()
    assert expected_letters("A and B", ("A only", "B only", "A and B")) == {"C"}
    assert expected_letters("A and B", ("x", "y", "z")) == {"A", "B"} == expected_letters("(A), B.", ())
    assert expected_letters("a", ()) == frozenset() and expected_letters("J", ()) == frozenset()
    assert expected_letters("blue", ("red", "blue")) == {"B"} == expected_letters("(B)", ("red", "blue"))
