"""Published scores: worked examples, and naive twins."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmgraft.evaluation.metrics import (
    METRICS,
    Expected,
    all_right,
    binary,
    four_way,
    rotations,
    vqa_form,
)


def score(metric: str, output: str, *answers: str) -> float:
    return METRICS[metric](output, Expected(answers)).score


@pytest.mark.parametrize(("matching", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_leaves_one_annotator_out(matching: int, expected: float) -> None:
    """Of ten annotators `matching` say what the model says; 0.3, 0.6, 0.9 are the published steps."""
    answers = ["dog"] * matching + [f"other {n}" for n in range(10 - matching)]
    assert score("vqa", "Dog.", *answers) == pytest.approx(expected)


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=10), st.sampled_from("abc"))
def test_vqa_is_the_mean_over_subsets(answers: list[str], said: str) -> None:
    subsets = list(combinations(answers, len(answers) - 1))
    naive = sum(min(1.0, subset.count(said) / 3) for subset in subsets) / len(subsets)
    # "a" is an article, and VQA drops articles: the letters are written double here
    assert score("vqa", said * 2, *[answer * 2 for answer in answers]) == pytest.approx(naive)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A dog", "dog"),
        ("two", "2"),
        ("The  Red car.", "red car"),
        ("1,000", "1000"),
        ("coca-cola", "Coca Cola"),
        ("dont know", "don't know"),
        ("U.S.A.", "usa"),
        ("12/25", "12-25"),
        ("what?", "what"),
        ("5, 6", "5 6"),
    ],
)
def test_vqa_form(one: str, other: str) -> None:
    assert vqa_form(one) == vqa_form(other)


@pytest.mark.parametrize(
    ("one", "other"), [("11:30", "11 30"), ("$5", "5"), ("3.5", "35"), ("#1", "1"), ("it's", "its")]
)
def test_vqa_form_keeps_what_the_server_keeps(one: str, other: str) -> None:
    assert vqa_form(one) != vqa_form(other)


@pytest.mark.parametrize(
    ("output", "answer", "right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("94.9", "100", False),
        ("-105", "-100", True),
        ("100", "-100", False),
        ("0", "0", True),
        ("0.01", "0", False),
        ("2014", "2012", True),  # the published measure forgives years
        ("50%", "50", True),
        ("50%", "0.5", True),
        ("1,050", "1000", True),
        ("Italy", "italy", True),
        ("The answer is 103.", "100", True),
        ("It is Italy", "Italy", True),
        ("Italy", "Spain", False),
        ("", "100", False),
        ("<think>100</think>", "100", False),
    ],
)
def test_relaxed_accuracy(output: str, answer: str, right: bool) -> None:
    assert score("relaxed", output, answer) == float(right)


def test_relaxed_accuracy_without_a_reference_of_zero_never_divides_by_it() -> None:
    assert score("relaxed", "5", "0") == 0


@pytest.mark.parametrize(
    ("output", "answer", "right"),
    [
        ("The sign says STOP now", "stop", True),
        ("st op", "stop", False),
        ("\\frac { 1 } { 2 }", "\\frac{1}{2}", True),
        ("<think>stop</think>go", "stop", False),
        ("", "stop", False),
        ("line\nbreak", "line break", True),
    ],
)
def test_contains(output: str, answer: str, right: bool) -> None:
    assert score("contains", output, answer) == float(right)


@pytest.mark.parametrize(("output", "answer", "right"), [("Yes", "1", True), ("No.", "0", True), ("Maybe", "0", False)])
def test_yes_no_reads_hallusionbench_digits(output: str, answer: str, right: bool) -> None:
    assert score("yes_no", output, answer) == float(right)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_binary_figures_are_scikit_learns(pairs: list[tuple[bool, bool]]) -> None:
    from sklearn.metrics import f1_score, precision_score, recall_score

    said, true = map(list, zip(*pairs, strict=True))
    found = binary(said, true, [a == b for a, b in pairs])
    assert found.f1 == pytest.approx(f1_score(true, said, zero_division=0.0))
    assert found.precision == pytest.approx(precision_score(true, said, zero_division=0.0))
    assert found.recall == pytest.approx(recall_score(true, said, zero_division=0.0))
    assert found.accuracy == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_the_four_ways_of_wemath() -> None:
    problems = [
        ([True, True], True),  # mastery
        ([True, False], True),  # mastery if loose, rote if strict
        ([False, False], True),  # rote
        ([True, True], False),  # inadequate generalisation
        ([True, False], False),  # insufficient knowledge
    ]
    found = four_way(problems)
    assert (found.mastery_strict, found.mastery_loose) == (0.2, 0.4)
    assert (found.inadequate, found.insufficient) == (0.2, 0.2)
    assert (found.rote_strict, found.rote_loose) == pytest.approx((2 / 3, 1 / 3))
    assert (found.score_strict, found.score_loose) == pytest.approx((0.3, 0.5))


@given(st.lists(st.tuples(st.lists(st.booleans(), min_size=2, max_size=3), st.booleans()), min_size=1, max_size=40))
def test_the_four_ways_are_all_the_ways(problems: list[tuple[list[bool], bool]]) -> None:
    """The authors' formula: (total - inadequate / 2 - rote - insufficient) / total."""
    found, solved = four_way(problems), sum(whole for _, whole in problems)
    for rote, mastery, total in (
        (found.rote_strict, found.mastery_strict, found.score_strict),
        (found.rote_loose, found.mastery_loose, found.score_loose),
    ):
        share = rote * solved / len(problems)
        assert share + mastery + found.inadequate + found.insufficient == pytest.approx(1)
        assert total == pytest.approx(1 - 0.5 * found.inadequate - share - found.insufficient)


@pytest.mark.parametrize("problems", [[], [([], True)]])
def test_four_ways_need_problems_with_steps(problems: list[tuple[list[bool], bool]]) -> None:
    with pytest.raises(ValueError, match="steps"):
        four_way(problems)


def test_circular_options_are_right_together_only() -> None:
    assert rotations(["x", "y", "z"]) == [("x", "y", "z"), ("y", "z", "x"), ("z", "x", "y")]
    assert all_right({"a": [1, 1, 1], "b": [1, 0, 1], "c": [0.5]}) == pytest.approx(1 / 3)


def test_the_best_of_several_references_counts() -> None:
    assert score("auto", "17", "18", "17") == 1 and score("auto", "17", "18", "19") == 0
