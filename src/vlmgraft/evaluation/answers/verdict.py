"""Whether the final answer is the expected one. Pure, no torch.

The strongest evidence that can be read as an answer of the expected type decides; weaker evidence is then ignored.
Judging is as strict as a careful person: two answers count as none, and a contradiction is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlmgraft.evaluation.answers.extract import evidence, read_final
from vlmgraft.evaluation.answers.options import expected_letters, pick, pick_several
from vlmgraft.evaluation.answers.quantities import Quantity, read_quantity, same_quantity
from vlmgraft.evaluation.answers.text import key
from vlmgraft.evaluation.answers.values import readings, same_value, stated_number, yes_or_no


@dataclass(frozen=True)
class Verdict:
    """The judgement of an output: the text that was read as its answer, a score in [0, 1], whether an answer was
    `found`, and `how` it was marked."""

    answer: str
    score: float
    found: bool
    how: str


def judge(output: str, expected: str, choices: Sequence[str] = (), *, precision: int | None = None) -> Verdict:
    """The verdict on a model's whole output, given the expected answer.

    Args:
        choices: the texts of the lettered choices; `expected` is then a letter (or several, "A, C") or a choice's text.
        precision: number of decimals that suffice, if the question states it.
    """
    wanted = expected_letters(expected, choices)
    if wanted:
        return _judge_option(output, wanted, choices)
    if key(expected) in ("yes", "no", "true", "false"):
        return _judge_stance(output, key(expected) in ("yes", "true"))
    number = read_quantity(expected)
    for answer, how in evidence(output):
        stated = stated_number(answer, marked=how == "box") if number else None
        if number and stated:
            return Verdict(answer, float(same_quantity(stated, number, precision)), True, how)
        for reading in readings(answer):
            if same_value(reading, expected, precision):
                return Verdict(reading, 1.0, True, how)
        if how in ("box", "tag") or (how != "text" and not number):
            return Verdict(answer, 0.0, True, how)
    answer, how = read_final(output)
    return Verdict(answer, 0.0, bool(answer) and (number is None or any(map(str.isdigit, answer))), how)


def stated_answer(output: str) -> tuple[Quantity | None, str]:
    """The number that an output finally states, and the text it was read from."""
    for answer, how in evidence(output):
        stated = stated_number(answer, marked=how == "box")
        if stated is not None:
            return stated, answer
    return None, ""


def _judge_stance(output: str, wanted: bool) -> Verdict:
    for answer, how in evidence(output):
        stance = yes_or_no(answer)
        if stance is not None:
            return Verdict(answer, float(stance is wanted), True, how)
    answer, how = read_final(output)
    return Verdict(answer, 0.0, False, how)


def _judge_option(output: str, wanted: frozenset[str], choices: Sequence[str]) -> Verdict:
    marks = evidence(output)
    for answer, how in marks:
        if how == "text" and marks[0][1] == "box":
            break  # the box names no choice, and nothing else was declared
        if len(wanted) > 1:
            picked = pick_several(answer, choices)
        else:
            letter = pick(answer, choices)
            picked = frozenset(letter) if letter else frozenset()
        if picked:
            return Verdict(", ".join(sorted(picked)), float(picked == wanted), True, how)
    answer, how = read_final(output)
    return Verdict(answer, 0.0, False, how)


def same_answer(answer: str, expected: str) -> bool:
    """Equal up to case, surrounding punctuation and white space; single numbers by value ("17.0" is "17")."""
    given, target = key(answer), key(expected)
    if given == target:
        return bool(target)
    if not re.search(r"\d", given) or not re.search(r"\d", target):
        return False
    left, right = read_quantity(given), read_quantity(target)
    if left is None or right is None or left.unit or right.unit or None in (left.decimals, right.decimals):
        return False
    return left.value == right.value
