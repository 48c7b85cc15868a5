"""Reading a text takes no more than linear time, and ends."""

from __future__ import annotations

import time

import pytest

from vlmgraft.evaluation.answers import choices_within, judge

REPEATED = (
    *(" ", "\t", "\n", "`", "\\boxed{", "7", "$", "4 + ", "1, ", "((", "is 1 ", "½", "A or ", "Answer: ", "<think>"),
    *("1 h ", "twenty ", "7:45 ", "no a ", "x < 3 "),
    *("4 + 4 = 8. ", "Wait, let me check again. ", "The value is 5. ", "So the angle at A is 50 degrees, "),
)


REPEATED_TOO = (
    *(
        "(",
        "[",
        "{",
        "}",
        "**",
        "_",
        "=",
        "&",
        "^",
        "\u2009",
        "-",
        "%",
        "~",
        "1:",
        "e9",
        "(1,",
        "x = ",
        "5 or ",
        "is ",
        "no ",
    ),
    *(
        "yes ",
        "so ",
        "not ",
        "| a ",
        "<<",
        "\\boxed",
        "\\frac{",
        "\\text{",
        "\\circ",
        "\\(",
        "\\begin{pmatrix}",
        "</think>",
    ),
    *("<answer>", "the answer is ", "A. ", "(A) ", "A:1\n", "Choices:", '"answer": "', "#### ", "<|", "。", "，", "是"),
    *("答案是", "There are 5 ", "1 and ", "\\pm ", "1!", "[1,", "'answer': '", "\u2028", "\\sqrt{", "A: 1 B: 2 "),
)


def reading_seconds(piece: str, length: int) -> float:
    """Processor time of judging a loop of so many characters; waiting on a busy machine does not count."""
    text = piece * (length // len(piece))
    started = time.process_time()
    for answer in (text, f"\\boxed{{{text}}}"):
        judge(answer, "\\frac{1}{7}")
        judge(answer, "A", ("red", "3"))
    judge(text, "yes")
    choices_within(text)
    return time.process_time() - started


@pytest.mark.parametrize("piece", [*REPEATED, *(pytest.param(piece, marks=pytest.mark.slow) for piece in REPEATED_TOO)])
def test_twice_the_text_takes_no_more_than_twice_the_time(piece: str) -> None:
    """Up to 100,000 characters. What backtracks takes four times as long at each doubling, or never ends at all.

    No bound on seconds, which depend on the machine: three times the time is allowed, and a quarter of a second for
    what is too short to measure; a doubling that takes longer is measured twice more before it fails.
    """
    before = 3 * reading_seconds(piece, 380)  # above 300 characters no algebra is asked
    for length in (3_125, 6_250, 12_500, 25_000, 50_000, 100_000):
        allowed = 3 * before + 0.25
        seconds = [reading_seconds(piece, length)]
        while seconds[-1] > allowed and len(seconds) < 3:
            seconds.append(reading_seconds(piece, length))
        before = min(seconds)
        assert before <= allowed, f"{length} characters take {before:.2f} s, allowed are {allowed:.2f} s"


@pytest.mark.parametrize("form", ["10^{999999999}", "99999999!", "2^{3^{4^{5}}}", "((" * 100, "1" * 300, "4 + " * 90])
def test_no_expression_runs_away(form: str) -> None:
    assert judge(f"\\boxed{{{form}}}", "\\frac{1}{7}").score == 0
