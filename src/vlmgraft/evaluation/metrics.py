"""The scores that benchmarks are published with. Pure, no torch.

Item scores take a model's whole output and the reference answers, and give a `Verdict`. Group scores take item
scores that belong together (rotations of one question, variants, the steps of one problem).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from vlmgraft.evaluation.answers import Verdict, final_answer, judge, read_final, without_reasoning
from vlmgraft.evaluation.quantities import read_quantity
from vlmgraft.evaluation.text import key, plain
from vlmgraft.evaluation.values import same_answer, same_value, yes_or_no

_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_CONTRACTED = re.compile(r"^(ai|are|ca|could|did|does|do|had|has|have|is|might|must|need|should|was|were|wo|would)nt$")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_WORDS)}}


@dataclass(frozen=True)
class Expected:
    """What an item's answer is compared with: reference answers, lettered choices, decimals that are enough."""

    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    precision: int | None = None


Metric = Callable[[str, Expected], Verdict]


def auto(output: str, expected: Expected) -> Verdict:
    """By the kind of the reference answer: option, yes or no, number, list, expression or text; the best of several."""
    verdicts = [judge(output, each, expected.choices, precision=expected.precision) for each in expected.answers]
    return max(verdicts, key=lambda verdict: (verdict.score, verdict.found))


def exact(output: str, expected: Expected) -> Verdict:
    """The final answer and nothing else, by `same_answer`; both sides are read the same way."""
    said, how = read_final(output)
    right = any(same_answer(said, final_answer(each)) for each in expected.answers)
    return Verdict(said, float(right), bool(said), how)


def vqa(output: str, expected: Expected) -> Verdict:
    """VQA accuracy (Antol et al., 2015): leaving each annotator out in turn, the mean of
    min(1, matches among the others / 3)."""
    said, how = read_final(output)
    mine, others = vqa_form(said), [vqa_form(each) for each in expected.answers]
    if len(others) == 1:
        return Verdict(said, float(mine == others[0]), bool(said), how)
    matches = sum(mine == each for each in others)
    left_out = [min(1.0, (matches - (mine == each)) / 3) for each in others]
    return Verdict(said, fmean(left_out), bool(said), how)


def vqa_form(text: str) -> str:
    """The form in which the VQA server compares: lower case, number words as digits, no articles, no punctuation.

    A mark beside a space is dropped, one inside a word becomes a space; if a comma groups digits anywhere, all marks
    are dropped. Full stops go unless a digit follows.
    """
    text = " ".join(plain(text).casefold().split())
    grouped = re.search(r"\d,\d", text)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside = f"{mark} " in text or f" {mark}" in text
        text = text.replace(mark, "" if beside or grouped else " ")
    words = re.sub(r"\.(?!\d)", "", text).split()
    words = [_CONTRACTED.sub(r"\1n't", _DIGITS.get(word, word)) for word in words]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def relaxed(output: str, expected: Expected) -> Verdict:
    """ChartQA (Masry et al., 2022): numbers within 5 % of the reference, other answers as texts.

    Years, being numbers, profit from the 5 % too: that is the published measure. A percent sign divides by 100 on both
    sides, and is forgiven where only one side has it.
    """
    said, how = read_final(output)
    readings = [said, *([said.splitlines()[-1], re.sub(r"^.*\b(?:is|are|was|were)\s+", "", said)] if said else [])]
    right = any(_within(reading, each) for reading in readings for each in expected.answers)
    return Verdict(said, float(right), bool(said), how)


def _within(said: str, expected: str, tolerance: float = 0.05) -> bool:
    wanted, mine = read_quantity(expected), read_quantity(said)
    if wanted is not None and mine is not None and wanted.value != 0:
        ratio = abs(mine.value - wanted.value) / abs(wanted.value)
        hundredth = (mine.value / (100 if mine.unit == "%" else 1), wanted.value / (100 if wanted.unit == "%" else 1))
        other = abs(hundredth[0] - hundredth[1]) / abs(hundredth[1])
        return min(ratio, other) <= tolerance
    return same_value(said, expected)


def stance(output: str, expected: Expected) -> Verdict:
    """Yes or no: POPE, HallusionBench ("1" is yes). No stance is wrong, and counted as not found."""
    said, how = read_final(output)
    taken, wanted = yes_or_no(said), key(expected.answers[0]) in ("yes", "true", "1")
    label = said if taken is None else "yes" if taken else "no"
    return Verdict(label, float(taken is wanted), taken is not None, how)


def contains(output: str, expected: Expected) -> Verdict:
    """OCRBench (Liu et al., 2024): a reference stands in the answer, case and line breaks aside.

    References with LaTeX commands are compared without any white space and with case, as for HME100k.
    """
    said = plain(without_reasoning(output)).replace("\n", " ").strip()
    right = False
    for each in expected.answers:
        wanted = plain(each).replace("\n", " ").strip()
        if "\\" in wanted or "^" in wanted:
            right |= bool(wanted) and re.sub(r"\s", "", wanted) in re.sub(r"\s", "", said)
        else:
            right |= bool(wanted) and wanted.casefold() in said.casefold()
    return Verdict(said, float(right), bool(said), "text" if said else "none")


METRICS: Mapping[str, Metric] = {
    "auto": auto,
    "exact": exact,
    "vqa": vqa,
    "relaxed": relaxed,
    "yes_no": stance,
    "contains": contains,
}


@dataclass(frozen=True)
class Binary:
    """POPE's figures of yes-or-no answers: shares in [0, 1]; "yes" is the positive class, no stance counts as "no"."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_share: float


def binary(said_yes: Sequence[bool], is_yes: Sequence[bool], right: Sequence[bool]) -> Binary:
    """Accuracy from `right`, the others from the stances; a share of nothing is 0."""
    both = sum(said and true for said, true in zip(said_yes, is_yes, strict=True))
    precision, recall = (both / total if (total := sum(group)) else 0.0 for group in (said_yes, is_yes))
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return Binary(fmean(map(float, right)), precision, recall, f1, fmean(map(float, said_yes)))


@dataclass(frozen=True)
class FourWay:
    """WeMath's four ways to answer a problem whose steps are asked too (Qiao et al., 2024), shares in [0, 1].

    insufficient: problem wrong, a step wrong. inadequate: problem wrong though all steps are right. mastery: both
    right. rote: problem right without its steps, as a share of the problems solved. strict: one wrong step makes a
    right problem rote; loose: only if all steps are wrong. score = mastery + inadequate / 2.
    """

    problems: int
    insufficient: float
    inadequate: float
    mastery_strict: float
    mastery_loose: float
    rote_strict: float
    rote_loose: float
    score_strict: float
    score_loose: float


def four_way(problems: Sequence[tuple[Sequence[bool], bool]]) -> FourWay:
    """The four-way score of problems, each (steps right or wrong, the whole right or wrong).

    Raises ValueError without problems, and for a problem without steps.
    """
    if not problems or not all(steps for steps, _ in problems):
        raise ValueError("the four-way score needs problems, each with its steps")
    total = len(problems)
    inadequate = sum(all(steps) and not whole for steps, whole in problems)
    insufficient = sum(not all(steps) and not whole for steps, whole in problems)
    solved = [steps for steps, whole in problems if whole]
    strict, loose = sum(map(all, solved)), sum(map(any, solved))
    rote = [(len(solved) - mastery) / len(solved) if solved else 0.0 for mastery in (strict, loose)]
    scores = [(mastery + 0.5 * inadequate) / total for mastery in (strict, loose)]
    shares = [count / total for count in (insufficient, inadequate, strict, loose)]
    return FourWay(total, *shares, *rote, *scores)


def all_right(groups: Mapping[str, Sequence[float]]) -> float:
    """The share of groups with every item right: circular options, worst case over variants, question pairs."""
    return fmean(float(all(score == 1 for score in scores)) for scores in groups.values())


def rotations(choices: Sequence[str]) -> list[tuple[str, ...]]:
    """The choices in every rotation (MMBench's circular evaluation), the given order first."""
    return [tuple(choices[at:]) + tuple(choices[:at]) for at in range(len(choices))]
