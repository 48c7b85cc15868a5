"""The metrics that benchmarks are published with. Pure, no torch.

Item scores take a model's whole output and the reference answers, and give a `Verdict`. Group scores take item
scores that belong together (rotations of one question, variants, the steps of one problem).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from statistics import fmean

from vlmgraft.evaluation.answers.extract import final_answer, read_final, without_reasoning
from vlmgraft.evaluation.answers.quantities import Quantity, read_quantity
from vlmgraft.evaluation.answers.text import key
from vlmgraft.evaluation.answers.values import readings, stated_number, yes_or_no
from vlmgraft.evaluation.answers.verdict import Verdict, judge, same_answer, stated_answer
from vlmgraft.evaluation.items import Expected

_WORDS = ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(max(at - 1, 0)) for at, word in enumerate(_WORDS)}
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in re.findall(
        r"[\w']+",
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
        "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
        "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
        "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
        "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
        "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
        "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've "
        "you'll you're you've",
    )
    for at, char in enumerate(word)
    if char == "'"
} | {"somebody'd": "somebodyd"}
"""Words with one apostrophe missing → the word, as in EvalAI's table (which reverses the last entry)."""
_MAGNITUDE = re.compile(r"\b(?:hundred|thousand|million|billion|trillion|mn|bn)\b", re.IGNORECASE)


Metric = Callable[[str, Expected], Verdict]


def auto(output: str, expected: Expected) -> Verdict:
    """Compare by the reference's type: option, yes or no, number, list, expression or text; the best match counts."""
    verdicts = [judge(output, each, expected.choices, precision=expected.precision) for each in expected.answers]
    return max(verdicts, key=lambda verdict: (verdict.score, verdict.found))


def exact(output: str, expected: Expected) -> Verdict:
    """Whether the final answer equals a reference by `same_answer`; both are extracted in the same way."""
    answer, how = read_final(output)
    right = any(same_answer(answer, final_answer(each)) for each in expected.answers)
    return Verdict(answer, float(right), bool(answer), how)


def vqa(output: str, expected: Expected) -> Verdict:
    """VQA accuracy (Antol et al., 2015) of TextVQA and VizWiz: leaving each annotator out in turn, the mean of
    min(1, matches among the others / 3)."""
    answer, how = read_final(output)
    mine, others = vqa_form(answer), [vqa_form(each) for each in expected.answers]
    if len(others) == 1:
        return Verdict(answer, float(mine == others[0]), bool(answer), how)
    matches = sum(mine == each for each in others)
    left_out = [min(1.0, (matches - (mine == each)) / 3) for each in others]
    return Verdict(answer, fmean(left_out), bool(answer), how)


def vqa_form(text: str) -> str:
    """The form in which EvalAI compares answers to TextVQA and VizWiz: lower case, number words as digits, no articles,
    contractions with their apostrophe, no punctuation.

    Commas and question marks are dropped, "'s" becomes a separate word. Another mark is dropped if it occurs next to a
    space anywhere, else it becomes a space. Full stops are dropped unless a digit follows.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    spaced = text = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in ';/[]"{}()=+\\_-><@`!':
        beside = f"{mark} " in spaced or f" {mark}" in spaced
        text = text.replace(mark, "" if beside else " ")
    words = (_DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def relaxed(output: str, expected: Expected) -> Verdict:
    """ChartQA (Masry et al., 2022): numbers within 5 % of the reference, other answers as texts, ignoring case.

    As published, the 5 % apply to years too, and a reference of zero has no tolerance. The published metric takes the
    whole output as the answer; here the answer is extracted first, and a percent sign or a magnitude ("million") that
    only one side has is ignored.
    """
    answer, how = read_final(output)
    for reference in expected.answers:
        wanted = read_quantity(reference)
        stated, reading = stated_answer(output) if wanted is not None else (None, "")
        if wanted is not None and wanted.value != 0 and stated is not None:
            plain_number = stated_number(_MAGNITUDE.sub("", reading))
            values = {stated.value, *([plain_number.value] if plain_number else [])}
            values |= {value / 100 for value in values} if stated.unit == "%" and wanted.unit != "%" else set()
            targets = {wanted.value, *([wanted.value / 100] if wanted.unit == "%" and stated.unit != "%" else [])}
            if any(abs(value - target) <= abs(target) / 20 for value in values for target in targets):
                return Verdict(answer, 1.0, True, how)
        elif any(key(text) == key(reference) != "" for text in readings(answer)):
            return Verdict(answer, 1.0, True, how)
    return Verdict(answer, 0.0, bool(answer), how)


def stance(output: str, expected: Expected) -> Verdict:
    """Yes or no, as in HallusionBench (reference "1" is yes). An answer that is neither is wrong and not found."""
    answer, how = read_final(output)
    taken, wanted = yes_or_no(answer), key(expected.answers[0]) in ("yes", "true", "1")
    label = answer if taken is None else "yes" if taken else "no"
    return Verdict(label, float(taken is wanted), taken is not None, how)


def pope(output: str, expected: Expected) -> Verdict:
    """POPE (Li et al., 2023): an answer is "no" if its first sentence has the word "no" or "not", else "yes". Other
    denials ("NO!", "There isn't a dog") count as "no", and an answer that is neither is marked as not found."""
    answer, how = read_final(output)
    sentence = answer.split(".")[0]
    denied = {"No", "no", "not"} & set(sentence.replace(",", "").split()) or yes_or_no(sentence) is False
    label = "no" if denied else "yes"
    return Verdict(label, float(label == key(expected.answers[0])), yes_or_no(answer) is not None, how)


def contains(output: str, expected: Expected) -> Verdict:
    """OCRBench (Liu et al., 2024): whether the answer contains a reference, ignoring case and line breaks."""
    answer = without_reasoning(output).strip().replace("\n", " ")
    wanted = [reference.lower().strip().replace("\n", " ") for reference in expected.answers]
    return Verdict(answer, float(any(text and text in answer.lower() for text in wanted)), bool(answer), "text")


def contains_unspaced(output: str, expected: Expected) -> Verdict:
    """OCRBench on HME100k: whether the answer contains a formula, ignoring spaces and line breaks but not case."""
    answer = without_reasoning(output).replace("\n", "").replace(" ", "")
    wanted = [reference.replace("\n", "").replace(" ", "") for reference in expected.answers]
    return Verdict(answer, float(any(text and text in answer for text in wanted)), bool(answer), "text")


def mathvista(output: str, expected: Expected) -> Verdict:
    """MathVista (Lu et al., 2024): numbers are rounded to the decimals that the question asks for; without them, the
    answer is truncated to match an integer reference. MathVista extracts answers with a model, vlmgraft with rules."""

    def near(stated: Quantity, wanted: Quantity) -> bool:
        if not expected.precision:
            return wanted.decimals == 0 and int(stated.value) == wanted.value
        return round(stated.value, expected.precision) == round(wanted.value, expected.precision)

    return _or_near(auto(output, expected), output, expected, near)


def dynamath(output: str, expected: Expected) -> Verdict:
    """DynaMath (Zou et al., 2024): uses the field "short answer" of a JSON answer. A number must come first in it and
    be within 0.001; a text is right if the field contains it in the same case."""

    def near(stated: Quantity, wanted: Quantity) -> bool:
        return abs(stated.value - wanted.value) <= Fraction(1, 1000)

    verdict = auto(output, expected)
    if all(map(_plain_number, expected.answers)):
        stated, _ = stated_answer(output)
        if stated is not None and stated.decimals is not None:
            wanted = [number for reference in expected.answers if (number := read_quantity(reference))]
            verdict = replace(verdict, score=float(any(near(stated, number) for number in wanted)))
    answer, how = read_final(output)
    if how != "tag" or expected.choices:
        return verdict
    texts = [each for each in expected.answers if len(each) > 2 and not _plain_number(each)]
    if any(text in answer for text in texts):
        return Verdict(answer, 1.0, True, how)
    return verdict if texts or re.match(r"\W{0,3}(?:\d|[A-Z]\b|\\)", answer) else Verdict(answer, 0.0, True, how)


def _plain_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[\d.,]+", text.strip()) is not None


def two_decimals(output: str, expected: Expected) -> Verdict:
    """MathVision (Wang et al., 2024): numbers are equal if they agree when rounded to two decimals."""

    def near(stated: Quantity, wanted: Quantity) -> bool:
        return round(stated.value, 2) == round(wanted.value, 2)

    return _or_near(auto(output, expected), output, expected, near)


def mmmu(output: str, expected: Expected) -> Verdict:
    """MMMU (Yue et al., 2024): numbers must agree at two decimals; a text is right if the final answer contains it. The
    published parser guesses a letter if the answer names none; here such an answer is wrong."""

    verdict = two_decimals(output, expected)
    if verdict.score or expected.choices:
        return verdict
    answer, how = read_final(output)
    last = key((readings(answer) or [""])[-1]) if how == "text" else key(answer)
    texts = [key(each) for each in expected.answers if len(key(each)) > 1 and read_quantity(each) is None]
    return Verdict(answer, 1.0, True, how) if any(text in last for text in texts) else verdict


def _or_near(verdict: Verdict, output: str, expected: Expected, near: Callable[[Quantity, Quantity], bool]) -> Verdict:
    """The verdict, or a right one if the stated number is `near` a reference."""
    if verdict.score or expected.choices:
        return verdict
    stated, reading = stated_answer(output)
    wanted = [read_quantity(reference) for reference in expected.answers]
    decimals = [number for number in wanted if number is not None and number.decimals is not None]
    if stated is not None and stated.decimals is not None and any(near(stated, number) for number in decimals):
        return Verdict(reading, 1.0, True, verdict.how)
    return verdict


METRICS: Mapping[str, Metric] = {
    "auto": auto,
    "exact": exact,
    "vqa": vqa,
    "relaxed": relaxed,
    "yes_no": stance,
    "pope": pope,
    "contains": contains,
    "contains_unspaced": contains_unspaced,
    "mathvista": mathvista,
    "mathvision": two_decimals,
    "dynamath": dynamath,
    "mmmu": mmmu,
}
FREE_FORM = frozenset({"auto", "mathvista", "mathvision", "dynamath", "mmmu"})
"""Metrics of free-form answers, which a token limit may cut in the middle of a number."""


def binary(said_yes: Sequence[bool], is_yes: Sequence[bool]) -> dict[str, float]:
    """POPE's metrics of yes-or-no answers, in [0, 1]; "yes" is the positive class, and 0 / 0 counts as 0."""
    both = sum(answer and true for answer, true in zip(said_yes, is_yes, strict=True))
    precision, recall = (both / total if (total := sum(group)) else 0.0 for group in (said_yes, is_yes))
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return {"F1": f1, "precision": precision, "recall": recall, "yes share": fmean(map(float, said_yes))}


def four_way(problems: Sequence[tuple[Sequence[bool], bool]]) -> dict[str, float]:
    """WeMath's four outcomes of a problem whose steps are asked too (Qiao et al., 2024), as shares in [0, 1].

    insufficient: problem and a step wrong. inadequate: problem wrong, all steps right. mastery: problem and steps
    right. rote: problem right but not its steps, as a share of the solved problems. strict: one wrong step makes a
    right problem rote; loose: only if all steps are wrong. score = mastery + inadequate / 2.

    Args:
        problems: (whether each step is right, whether the problem is right) of every problem.
    Raises:
        ValueError: there is no problem, or one without steps.
    """
    if not problems or not all(steps for steps, _ in problems):
        raise ValueError("the four-way score needs problems, each with its steps")
    total = len(problems)
    inadequate = sum(all(steps) and not whole for steps, whole in problems)
    insufficient = sum(not all(steps) and not whole for steps, whole in problems)
    figures = {"problems": total, "insufficient": insufficient / total, "inadequate": inadequate / total}
    solved = [steps for steps, whole in problems if whole]
    for name, enough in (("strict", all), ("loose", any)):
        mastery = sum(map(enough, solved))
        figures[f"mastery_{name}"] = mastery / total
        figures[f"rote_{name}"] = (len(solved) - mastery) / len(solved) if solved else 0.0
        figures[f"score_{name}"] = (mastery + 0.5 * inadequate) / total
    return figures


def all_right(groups: Mapping[str, Sequence[float]]) -> float:
    """The share of groups with every item right: circular options, worst case over variants, question pairs."""
    return fmean(float(all(score == 1 for score in scores)) for scores in groups.values())
