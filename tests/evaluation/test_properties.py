"""A right answer stays right, and a wrong one wrong, under rewording that changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmgraft.evaluation.answers import final_answer, judge, repeats
from vlmgraft.evaluation.metrics import vqa_form
from vlmgraft.evaluation.options import letters, pick
from vlmgraft.evaluation.quantities import read_quantity, same_quantity
from vlmgraft.evaluation.text import key, plain, unwrap
from vlmgraft.evaluation.values import same_value

WORDINGS = (
    "{}",
    " {} \n",
    "{}.",
    "**{}**",
    "${}$",
    "\\boxed{{{}}}",
    "$\\boxed{{\\text{{{}}}}}$",
    "Answer: {}",
    "**Final Answer:** {}",
    "### Final Answer\n{}",
    "The answer is {}.",
    "So the final answer is: {}",
    "<think>It may be 4, B or no.</think>{}",
    "<think>\\boxed{{4}}</think>The correct answer is {}.",
    "<answer>{}</answer>",
    "Let me see.\n\nFirst I look at the picture.\nAnswer: {}",
    "Answer: \u200b{}\u200b",
)
wording = st.sampled_from(WORDINGS)
numbers = st.decimals(-(10**6), 10**6, allow_nan=False, places=2).map(lambda number: f"{number:f}")
words = st.sampled_from(["red", "dark blue", "a cat", "yes", "no", "north-west", "Paris", "3 apples", "12 cm", "1/3"])
CHOICES = ["red", "dark blue", "12 cm", "none of these", "5"]


@given(numbers, wording)
def test_a_right_number_stays_right(number: str, wording: str) -> None:
    assert judge(wording.format(number), number).score == 1


@given(numbers, numbers, wording)
def test_a_wrong_number_stays_wrong(number: str, other: str, wording: str) -> None:
    if float(number) != float(other):
        assert judge(wording.format(number), other).score == 0


@given(words, wording)
def test_a_right_word_stays_right(word: str, wording: str) -> None:
    assert judge(wording.format(word), word).score == 1


@given(words, words, wording)
def test_a_wrong_word_stays_wrong(word: str, other: str, wording: str) -> None:
    if word != other:
        assert judge(wording.format(word), other).score == 0


@given(
    st.integers(0, len(CHOICES) - 1),
    wording,
    st.sampled_from(["{0}", "({0})", "{0}.", "{0}. {1}", "option {0}", "{1}"]),
)
def test_a_right_option_stays_right(place: int, wording: str, form: str) -> None:
    letter = letters(len(CHOICES))[place]
    output = wording.format(form.format(letter, CHOICES[place]))
    for expected in (letter, CHOICES[place]):
        assert judge(output, expected, CHOICES).score == 1
    assert judge(output, letters(5)[place - 1], CHOICES).score == 0


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


@given(st.text(max_size=60), st.text(max_size=60))
def test_nothing_that_is_said_breaks_the_reader(said: str, expected: str) -> None:
    verdict = judge(said, expected)
    assert verdict.score in (0.0, 1.0)
    judge(said, "B", ["red", expected])
    assert final_answer(said) is not None and vqa_form(said) is not None and pick(said, ["red"]) in (None, "A")


@given(st.text(alphabet="0123456789.,+-/*^_{}()\\$%= abxπ°", max_size=25))
def test_nothing_that_looks_like_mathematics_breaks_the_reader(said: str) -> None:
    read_quantity(said)
    assert unwrap(unwrap(said)) is not None and key(said) is not None
    assert same_value(said, said) is bool(key(said))


@given(st.text(max_size=80))
def test_cleaning_settles(text: str) -> None:
    once = plain(text)
    assert plain(once) == once


@given(st.lists(st.integers(0, 99), min_size=2, max_size=6, unique=True), st.randoms())
def test_lists_in_brackets_have_an_order_and_others_have_none(numbers: list[int], random: object) -> None:
    turned = [*numbers[1:], numbers[0]]
    bare, other = ", ".join(map(str, numbers)), ", ".join(map(str, turned))
    assert same_value(bare, bare) and same_value(other, bare) and not same_value(f"({other})", f"({bare})")
    assert not same_value(", ".join(map(str, numbers[:-1])), bare)


@pytest.mark.parametrize(("text", "loop"), [("a b c " * 20, True), ("so " * 30, True), ("one two three", False)])
def test_loops(text: str, loop: bool) -> None:
    assert repeats("first this, " + text) is loop


def test_a_long_text_without_a_loop_has_none() -> None:
    assert not repeats(" ".join(str(n) for n in range(500)))
