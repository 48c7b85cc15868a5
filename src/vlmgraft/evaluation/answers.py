"""Reading a generated answer: what was finally said, and whether it is the expected one. Pure, no torch."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_ANSWER_LINE = re.compile(r"(?:^|\n)\s*(?:final )?answer\s*(?:is)?\s*[:=]\s*(.+)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def final_answer(text: str) -> str:
    """What is left after the reasoning: the text behind the last `</think>`; of it the last box, else the last line
    that begins with "Answer:", else all of it. Reasoning that never closes leaves an empty answer."""
    if "<think>" in text and "</think>" not in text:
        return ""
    said = text.rpartition("</think>")[2]
    for pattern in (_BOXED, _ANSWER_LINE):
        found = pattern.findall(said)
        if found:
            return str(found[-1]).strip()
    return said.strip()


def same_answer(said: str, expected: str) -> bool:
    """Equal up to case, surrounding punctuation and white space; single numbers by value ("17.0" is "17")."""
    one, other = (" ".join(text.lower().split()).strip(" .,;:!?\"'$") for text in (said, expected))
    if _NUMBER.fullmatch(one) and _NUMBER.fullmatch(other):
        return float(one.replace(",", "")) == float(other.replace(",", ""))
    return one == other and bool(other)
