"""Reading a generated answer: what was finally said, and whether it is the expected one. Pure, no torch.

`final_answer` finds what was said, `judge` compares it with what was expected. Judging is strict where a careful person
is: two answers are no answer, a contradiction is wrong, and reasoning that was cut off has not answered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlmgraft.evaluation.options import letters, pick, pick_several, pick_text
from vlmgraft.evaluation.quantities import read_quantity
from vlmgraft.evaluation.text import LONGEST, key, plain, unwrap
from vlmgraft.evaluation.values import same_answer, same_value, yes_or_no

__all__ = ["Verdict", "expected_letters", "final_answer", "judge", "read_final", "repeats", "same_answer"]

_THOUGHT = "think|thinking|thought|reasoning|analysis|reflection"
_CLOSE = re.compile(rf"</(?:{_THOUGHT})\s*>|◁/think▷|<\|end_of_thought\|>", re.IGNORECASE)
_OPEN = re.compile(rf"<(?:{_THOUGHT})\s*>|◁think▷|<\|begin_of_thought\|>", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|([^\s{\\]))")
_TAGGED = re.compile(
    r"<(answer|final_answer|final)>(.*?)</\1>|<\|begin_of_(?:box|solution)\|>(.*?)<\|end_of_(?:box|solution)\|>",
    re.IGNORECASE | re.DOTALL,
)
_MARKS = r"[\s*_#>`-]*"
_ANSWER_LINE = re.compile(
    rf"(?:(?:^|\n){_MARKS}|[.!?]\s+|\b(?:my|the|so|final|correct)\s+)"
    rf"(?:(?:my|the|final|correct|short)\s+)*(?:answer|答案)[*_]*\s*(?:is)?\s*[*_]*\s*[:=：][*_]*[ \t]*"
    rf"(?:\n+{_MARKS})?([^\n]+)",
    re.IGNORECASE,
)
_HEADED = re.compile(r"(?:^|\n)\s*(?:#+|\*\*)\s*(?:the\s+)?(?:final\s+)?answer\s*(?:\*\*)?\s*\n+\s*([^\n]+)", re.I)
_SENTENCE = re.compile(
    r"\b(?:the|my)\s+(?:(?:final|correct|right|best)\s+)*(?:answer|result|solution|option|choice|total|sum)"
    r"(?:\s+(?:here|therefore|thus|to (?:the|this) question))?\s+(?:is|would be|must be|should be|equals)\s+"
    r"(?!not\b)(?:therefore\s+|thus\s+|simply\s+)?([^\n]+)",
    re.IGNORECASE,
)
_END = re.compile(r"(?<!\bapprox)[.!?](?:\s|$)|;|\s[—–]\s|,?\s+(?:because|since|so that|as it|which)\b", re.IGNORECASE)
_HOPE = re.compile(r"[.\s]*I hope (?:it|this) is correct\.?\s*$", re.IGNORECASE)
_LAST_WORDS = re.compile(
    r".*(?:\b(?:it|that|this)'s\b|\b(?:is|are|was|were|equals|gives|get|got|says|reads|shows)\b|=|≈|:)\s*(.+)$",
    re.DOTALL | re.IGNORECASE,
)
_DENIAL = re.compile(r"\b(?:not|never|no longer|isn't|aren't|wasn't|cannot|can't|neither)\b|n't\b", re.IGNORECASE)
_NOT_THAT = re.compile(
    r"(?:,\s*|\()(?:and |but )?not\s+[^,.;()]+\)?|\bnot\s+[^\s,]+,?\s+but\s+"
    r"|,?\s*\b(?:instead of|rather than)\s+[^,.;()]+",
    re.IGNORECASE,
)
_SINGLE_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w|\.\d)%?")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_THEREFORE = re.compile(r"\b(?:so|thus|hence|therefore)\b,?", re.IGNORECASE)
_UNSURE = re.compile(r"\b(?:or|than|between|least|most|maybe|perhaps|could|might|may|either)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """What an answer is worth: the text that was read as the answer, its score in [0, 1], and whether anything could
    be read (`found`); `how` names the marker that led to it."""

    said: str
    score: float
    found: bool
    how: str


def without_reasoning(text: str) -> str:
    """The text behind the last `</think>` (or a tag like it); reasoning that never closes is cut away."""
    closed = list(_CLOSE.finditer(text))
    said = text[closed[-1].end() :] if closed else text
    opened = _OPEN.search(said)
    return said[: opened.start()] if opened else said


def read_final(text: str) -> tuple[str, str]:
    """The final answer and how it was marked: box, tag, line, sentence, text, or none.

    The order is that of METHODS.md: the last box that closes, then tags and "Answer:" lines, then "the answer is …",
    then all that was said. Boxes joined by "and" or a comma are one list.
    """
    said = without_reasoning(text)[-LONGEST:]
    boxed, cut = _boxes(said)
    if boxed:
        return boxed, "box"
    if cut:
        return "", "none"
    tagged = [first or second for _, first, second in _TAGGED.findall(said) if (first or second).strip()]
    if tagged:
        return _HOPE.sub("", tagged[-1]).strip(), "tag"
    lines = list(_ANSWER_LINE.finditer(said)) + list(_HEADED.finditer(said))
    if lines:
        last = max(lines, key=lambda found: found.start(1))
        line = _HOPE.sub("", last[1]).strip()
        nested = _SENTENCE.search(line)
        return (_first_clause(nested[1]) if nested else line), "line"
    sentences = _SENTENCE.findall(said)
    if sentences:
        return _first_clause(_HOPE.sub("", sentences[-1])), "sentence"
    return said.strip(), "text" if said.strip() else "none"


def final_answer(text: str) -> str:
    """What is left after the reasoning: the text behind the last `</think>`; of it the last box, else the last line
    that begins with "Answer:", else "the answer is …", else all of it. Reasoning that never closes leaves nothing."""
    return read_final(text)[0]


def judge(output: str, expected: str, choices: Sequence[str] = (), *, precision: int | None = None) -> Verdict:
    """The verdict on a model's whole output, given the expected answer.

    Args:
        choices: the texts of the lettered choices; `expected` is then a letter (or several, "A, C") or a choice's text.
        precision: decimals that are enough, where the question says so.
    """
    said, how = read_final(output)
    if choices:
        return _judge_option(said, how, expected, choices)
    if key(expected) in ("yes", "no", "true", "false"):
        stance = yes_or_no(said)
        wanted = key(expected) in ("yes", "true")
        return Verdict(said, float(stance is wanted), stance is not None, how)
    if re.fullmatch(r"\(?[A-H]\)?(?:\s*(?:,|and)\s*[A-H])*", expected.strip()):
        return _judge_option(said, how, expected, ())
    candidates = _worked_out(said) if how in ("box", "tag") else _candidates(said)
    if any(same_value(candidate, expected, precision) for candidate in candidates):
        return Verdict(next(each for each in candidates if same_value(each, expected, precision)), 1.0, True, how)
    number = read_quantity(expected) is not None
    found = bool(said) and (not number or any(char.isdigit() for char in said) or read_quantity(said) is not None)
    return Verdict(candidates[-1] if candidates else "", 0.0, found, how)


def _boxes(said: str) -> tuple[str, bool]:
    """The content of the last box that closes and is not empty, nested braces kept, a joined run of boxes as a list;
    and whether the text ends inside a box."""
    found: list[tuple[int, int, str]] = []
    at, cut = 0, False
    while not cut and (start := _BOX.search(said, at)) is not None:
        content, at = (start[1], start.end()) if start[1] else _braced(said, start.end())
        cut = at > len(said)
        if content.strip() and not cut:
            found.append((start.start(), at, content.strip()))
    run = found[-1:]
    for before in reversed(found[:-1]):
        if not re.fullmatch(r"[\s$]*(?:,|and|or|,\s*and|;)[\s$]*", said[before[1] : run[0][0]]):
            break
        run.insert(0, before)
    return ", ".join(re.sub(r"\\(?:boxed|fbox)\s*(?=\{)", "", content) for *_, content in run), cut


def _braced(text: str, start: int) -> tuple[str, int]:
    """What stands before the brace that closes the one before `start`, and the place behind it, beyond the end of the
    text when it never closes."""
    depth = 1
    for at in range(start, len(text)):
        if text[at] in "{}" and text[at - 1] != "\\":
            depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return text[start:at], at + 1
    return "", len(text) + 1


def _first_clause(sentence: str) -> str:
    end = _END.search(sentence)
    return (sentence[: end.start()] if end and end.start() else sentence).strip()


def _candidates(said: str) -> list[str]:
    """Readings of an answer without a box, most literal first: the line, its first clause, its last words."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if not lines:
        return []
    last = _NOT_THAT.sub("", lines[-1]) if len(lines[-1].split()) > 2 else lines[-1]
    clause = _first_clause(last)
    sentence = [part for part in re.split(r"(?<=[.!?])\s+", last) if part.strip()][-1:]
    conclusion = _THEREFORE.split(clause)[-1]
    readings = [lines[-1], last, clause, *sentence, conclusion]
    if 1 < len(lines) <= 20 and all(len(line.split()) <= 6 for line in lines):
        readings.append(", ".join(_BULLET.sub("", line) for line in lines))
    for reading in dict.fromkeys((clause, conclusion, *sentence)):
        if _DENIAL.search(reading) or _UNSURE.search(reading) or read_quantity(reading) is not None:
            continue
        words, numbers = _LAST_WORDS.match(reading), list(_SINGLE_NUMBER.finditer(plain(reading)))
        if words:
            readings.append(words[1])
        if len(numbers) == 1 and (not words or numbers[0].start() == 0):
            readings.append(numbers[0].group())
    return list(dict.fromkeys(reading.strip() for reading in readings if reading.strip()))


def _worked_out(said: str) -> list[str]:
    """A marked answer, and what stands behind its last sign of equality."""
    behind = said.rpartition("=")[2].strip()
    return [said] if behind in ("", said) else [said, behind]


def _judge_option(said: str, how: str, expected: str, choices: Sequence[str]) -> Verdict:
    wanted = expected_letters(expected, choices)
    if not wanted:  # the reference is none of the choices
        right = any(same_value(each, expected) for each in _candidates(said))
        return Verdict(said, float(right), bool(said), how)
    if len(wanted) > 1:
        several = pick_several(said, choices)
        return Verdict(", ".join(sorted(several)) or said, float(several == wanted), bool(several), how)
    found = pick(said, choices) or next(
        (letter for each in _candidates(said) if (letter := pick_text(each, choices))), None
    )
    return Verdict(found or said, float(found is not None and {found} == wanted), found is not None, how)


def expected_letters(expected: str, choices: Sequence[str]) -> frozenset[str]:
    """The letters of an expected answer: letters as they are, else the choices whose text it is.

    "B" is a letter unless it is the text of another choice and no single letter could be meant.
    """
    allowed = letters(len(choices) or 8)
    texts = [letter for letter, choice in zip(allowed, choices, strict=False) if key(choice) == key(expected) != ""]
    if texts and len(unwrap(expected).strip("()")) > 1:
        return frozenset(texts[:1])
    found = (
        re.findall(r"[A-Z]", expected.upper())
        if re.fullmatch(r"[\s(]*[A-Za-z](?:[\s,;&()]+(?:and\s+)?[A-Za-z])*[\s).]*", expected)
        else []
    )
    listed = frozenset(found) if found and set(found) <= set(allowed) else frozenset()
    return listed or frozenset(texts[:1])


def repeats(text: str) -> bool:
    """Whether a text ends in a loop: the same 1 to 60 words at least four times, over 20 words or more."""
    words = text.split()[-600:]
    for period in range(1, 61):
        times = max(4, -(-20 // period))
        tail = words[-period * times :]
        if len(tail) == period * times and tail == tail[:period] * times:
            return True
    return False
