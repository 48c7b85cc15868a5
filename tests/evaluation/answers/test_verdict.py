"""Whether what was finally said is the expected answer."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from vlmgraft.evaluation.answers import final_answer, judge, same_answer
from vlmgraft.evaluation.answers.options import pick
from vlmgraft.evaluation.metrics import vqa_form


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


@pytest.mark.parametrize(
    ("output", "expected", "right"),
    [
        ("There are 6 boats left after two of the 8 sail away.", "6", True),
        ("Three groups have more than 20 members: red, green and blue.", "3", True),
        ("The rate was above 700 in three years: 1990, 1994 and 2001.", "3", True),
        ("There are 9 lamps in total. Taking away 3 and 2 leaves 9 - 3 - 2 = 4 lamps.", "9", False),
        ("There are 9 lamps in total. Taking away 3 and 2 leaves 9 - 3 - 2 = 4 lamps.", "4", True),
        ("The grey part is 5 times the area of one of the squares.", "5", True),
        ("The grey part is 5 times the area of one of the squares.", "1", False),
        ("The vertex lies at the point (2,-1) of the grid.", "(2,-1)", True),
        ("The vertex lies between (2,-1) and (3,4).", "(3,4)", False),
        ("The half-plane is\n\nx > 7\n\nso that x lies to the right of the line.", "$x > 7$", True),
        ("The area is $\\pi \\cdot 16 \\text{cm}^2$.", "Area $=16 \\pi \\mathrm{cm}^{2}$", True),
        ("The peak is at $(\\frac{\\pi}{3}, 2)$.", "$(60^{\\circ}, 2)$", True),
        ("The peak is at $(\\frac{\\pi}{4}, 2)$.", "$(60^{\\circ}, 2)$", False),
        ("The cost is 3 * $4 = $<<3*4=12>>12", "12", True),
        ("**Answer:** $U = 2.5\\,\\mathrm{V}$.", "2.5", True),
        ("9. The row goes on as 1, 3, 5, 7.", "9", True),
        ("I write it in \\boxed{answer} form.\n\nThe answer is 8.", "8", True),
        ("The least of the values between 2 and 9 is 4.", "4", True),
        ("It is 4 or 5.", "4", False),
        ("\\boxed{(1,20)}", "(1,2)", False),
        ("\\boxed{2.5}", "(2,5)", False),
        ("\\boxed{(0, 4]}", "(0,4)", False),
        ("\\boxed{1/40!}", "\\frac{1}{38!}", False),
        ("\\boxed{3 \\times 10^{-30}}", "3 \\times 10^{-31}", False),
        ("\\boxed{\\pm 6}", "6", False),
        ("\\boxed{6, -6}", "\\pm 6", True),
        ("\\boxed{\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}}", "\\begin{bmatrix}1 & 2 \\\\ 3 & 4\\end{bmatrix}", True),
        (
            "\\boxed{\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}}",
            "\\begin{bmatrix}1 & 2 \\\\ 3 & 4\\end{bmatrix}",
            False,
        ),
        ("third", "3rd", True),
        ("The area is 58 cm^2.", "Area $=58 \\mathrm{~cm}^{2}$", True),
        ("The area is 58 mm^2.", "Area $=58 \\mathrm{~cm}^{2}$", False),
        ("The volumes are as 1:27, so the ratio is 1:27.", "1:27", True),
        ('{"solution": "2 and 2 make 4", "short answer": "5"}', "5", True),
        ("是的，有一只猫。", "yes", True),
        ("否", "no", True),
        ("I am not sure.", "no", False),
    ],
)
def test_what_models_write(output: str, expected: str, right: bool) -> None:
    assert judge(output, expected).score == float(right)


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


@given(st.text(max_size=60), st.text(max_size=60))
def test_nothing_that_is_said_breaks_the_reader(said: str, expected: str) -> None:
    verdict = judge(said, expected)
    assert verdict.score in (0.0, 1.0)
    judge(said, "B", ["red", expected])
    assert final_answer(said) is not None and vqa_form(said) is not None and pick(said, ["red"]) in (None, "A")


@pytest.mark.parametrize(
    ("output", "expected", "right"),
    [
        ("minus five", "-5", True),
        ("The answer is negative 5.", "-5", True),
        ("minus five", "5", False),
        ("20 degrees", "20°C", True),
        ("20 degrees", "20.4°C", False),
        ("20 rad", "20°C", False),
        ("68°F", "20°C", True),  # (68 - 32) * 5/9
        ("20°C", "68°F", True),
        ("293.15 kelvin", "20°C", True),
        ("68°F", "68°C", False),
        ("1 234", "1234", True),
        ("12 345,5 km", "12345.5", True),
        ("1 2345", "12345", False),
        ("1 234/5", "239/5", True),  # a mixed number
        ("答えは12です。", "12", True),
    ],
)
def test_words_for_signs_degrees_temperatures_and_spaced_thousands(output: str, expected: str, right: bool) -> None:
    assert judge(output, expected).score == right


@pytest.mark.parametrize("output", ["答えはB", "答えはBです。", "正解はBです", "計算すると、答えはBになります。"])
def test_a_japanese_sentence_names_its_option(output: str) -> None:
    assert judge(output, "B", ("x", "y", "z")).score == 1 and judge(output, "A", ("x", "y", "z")).score == 0
