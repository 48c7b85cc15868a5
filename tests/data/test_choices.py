"""Choices in the layouts of published data sets, each read as its card describes it."""

from __future__ import annotations

from typing import Any

import pytest

from vlmgraft.data.choices import Choices, number_text, read_choices, refuse_counts_from_one
from vlmgraft.errors import DataError

RED_BLUE = ("red", "blue")


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (["red", "blue"], RED_BLUE),
        ({"text": ["red", "blue"], "label": ["A", "B"]}, RED_BLUE),  # ARC, CommonsenseQA
        ({"label": ["B", "A"], "text": ["blue", "red"]}, RED_BLUE),
        ([{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}], RED_BLUE),  # OpenBookQA's source
        ([{"key": "B", "value": "blue"}, {"key": "A", "value": "red"}], RED_BLUE),  # bigbio's MedQA
        ([{"text": "red"}, {"text": "blue"}], RED_BLUE),
        ([["A", "red"], ["B", "blue"]], RED_BLUE),
        ({"B": "blue", "A": "red"}, RED_BLUE),
        ({"a": "red", "b": "blue"}, RED_BLUE),
        ({"2": "blue", "1": "red"}, RED_BLUE),
        ({"A": "red", "B": None, "C": "green", "D": "x"}, ("red", "", "green", "x")),
        ({"A": "red", "B": "blue", "C": None, "D": float("nan")}, RED_BLUE),
        ({"F": "red", "G": "blue"}, ("", "", "", "", "", "red", "blue")),
        ('{"A": "red", "B": "blue"}', RED_BLUE),
        ("{'A': 'red', 'B': 'blue'}", RED_BLUE),
        ("['red', 'blue']", RED_BLUE),
        ("['red' 'blue']", RED_BLUE),  # numpy
        ("['red'\n \"blue's\"]", ("red", "blue's")),
        ("[1, 2, 3]", ("1", "2", "3")),
        ("(A) red (B) blue", RED_BLUE),
        (["A. red", "B. blue"], RED_BLUE),
        (["(a) red", "(b) blue"], RED_BLUE),
        (["A:B", "B:A"], ("A:B", "B:A")),  # ratios
        (["A", "B", "C"], ("A", "B", "C")),
        (["A. red", "C. blue"], ("A. red", "C. blue")),
        ([True, False], ("True", "False")),
        ("[]", ()),
        ("", ()),
        (None, ()),
        (float("nan"), ()),
        ({"A": None, "B": None}, ()),
    ],
)
def test_layouts(value: Any, texts: tuple[str, ...]) -> None:
    assert read_choices(value).texts == texts


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("red, blue", "'red, blue' is neither a list nor lettered"),
        ("red|blue", "neither a list"),
        ("[1 2 3]", "neither a list"),
        (5, "5 is no list"),
        (["red", ["blue"]], r"a choice is no text: \['blue'\]"),
        ([[1, 2], [3, 4]], "a choice is no text"),
        ([{"colour": "red"}, {"colour": "blue"}], "a choice has no text.*its keys may be label"),
        ({"left": "red", "right": "blue"}, "labels are no letters or numbers: left, right"),
        ([{"label": "A", "text": "red"}, {"label": "A", "text": "blue"}], "labels are no letters or numbers: A, A"),
        ({"text": ["red", "blue"], "label": ["A"]}, "differ in number"),
        (list(range(27)), "27 choices; at most 26"),
    ],
)
def test_what_cannot_be_read_is_said(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_choices(value)


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (["red", "blue"], 1, "B"),
        (["red", "blue"], 1.0, "B"),
        (["red", "blue"], "1", "B"),
        (["red", "blue"], "B", None),
        (["red", "blue"], "blue", None),
        (["red", "blue"], True, None),
        (["3", "1", "2"], 1, None),  # the choice itself
        (["1.0", "2.0"], 1.0, "A"),
        (["10 cm", "20 cm"], "1", None),  # a text that is no choice
        ({"1": "red", "2": "blue"}, 1, "A"),  # ARC's numbers
        ({"0": "red", "1": "blue"}, "1", "B"),
        ([{"label": "(1)", "text": "red"}, {"label": "(2)", "text": "blue"}], "2", "B"),
        (["A. red", "B. blue"], "B. blue", "B"),
    ],
)
def test_answers_name_choices_by_label_or_index(choices: Any, answer: Any, letter: str | None) -> None:
    assert read_choices(choices).letter_of(answer) == letter


@pytest.mark.parametrize(
    ("choices", "answer", "message"),
    [
        (["red", "blue"], 2, "answer '2' is none of the 2 choices"),
        (["red", "blue"], -1, "answer '-1' is none"),
        ({"A": "red", "B": None, "C": "x"}, 1, "answer '1' is none"),
        ({"1": "red", "2": "blue"}, 0, "answer '0' is none"),
        ({"1": "2", "2": "3"}, "2", "label of one choice and the text of another"),
    ],
)
def test_answers_that_name_no_choice_or_two_are_refused(choices: Any, answer: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_choices(choices).letter_of(answer)


def test_indices_that_count_from_one_are_refused() -> None:
    two = Choices(("red", "blue"))
    for answers in ((1, 2), ("1", "2"), (2,)):
        with pytest.raises(DataError, match=r"q\.jsonl: the answers number the choices from 1; number them from 0"):
            refuse_counts_from_one([(two, answer) for answer in answers], "q.jsonl")
    for fine in ((0, 1), (0, 2), (1,), ("A", "2 cm"), ()):
        refuse_counts_from_one([(two, answer) for answer in fine], "q.jsonl")
    refuse_counts_from_one([(Choices(("1", "2")), 2), (read_choices({"1": "a", "2": "b"}), 2)], "q.jsonl")


def test_whole_floats_are_integers() -> None:
    assert [number_text(value) for value in (1.0, 1.5, 2, "x", float("inf"), True)] == [
        "1",
        "1.5",
        "2",
        "x",
        "inf",
        "True",
    ]
