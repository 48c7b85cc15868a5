"""Which lettered choice an answer picks: by letter, or by the choice's own text. Pure, no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlmgraft.evaluation.quantities import read_quantity, same_quantity
from vlmgraft.evaluation.text import key, unwrap

_LOOKALIKES = str.maketrans("АВСЕНасе", "ABCEHace")
"""Cyrillic letters that look like Latin ones."""
_WORD = r"(?:option|choice|answer|letter|figure|选项)"
_ONLY = re.compile(rf"(?:the\s+)?(?:correct\s+)?(?:{_WORD}\s*(?:is)?\s*:?\s*)?[(\[]?([A-Za-z])[)\]]?[.:,)]*", re.I)
_LEADING = re.compile(r"[(\[]?([A-Z])(?:[)\].:,]+|\s*[-=]\s)\s*(.*)", re.DOTALL)
_NAMED = re.compile(rf"\b{_WORD}s?\s*(?:is|are|:)?\s*[(\[]?([A-Z])\b[)\]]?", re.IGNORECASE)
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
_LIST_ITEM = re.compile(r"(?:^|[\s(])[(\[]?([A-Z])[.):\]]\s+\S")
_CHOSEN = re.compile(
    r"\b(?i:hence|so|thus|therefore),?\s+[(\[]?([A-Z])[)\]]?(?=[.,!\s]*$)|"
    r"\b(?:choose|pick|select|go with|going with|mark)\s+(?:option\s+)?[(\[]?([A-Z])\b"
    r"|(?<![\w'-])[(\[]?([A-Z])[)\]]?\s+(?:is|must be|would be|seems)\s+(?:the\s+)?(?:correct|right|true|answer|best)\b"
)
_STANDING = re.compile(r"(?<![\w'-])(?:([B-Z])|(A)(?!\s+(?!is|because|as|since|or|and)[a-z]))(?![\w'-])")
_CLAUSE = re.compile(r"\b(?:because|since|as|while|whereas|but|not)\b|[.;\n](?:\s|$)")
_DENIED = re.compile(
    r"\b(?:not|isn't|can't|cannot|neither|nor|rather than|instead of|except|wrong|incorrect)\b", re.IGNORECASE
)
_SEVERAL = re.compile(r"[A-Za-z](?:\s*(?:,|;|&|/|\band\b|，|、)\s*(?:and\s+)?[A-Za-z])+|[A-Z]{2,8}")


def letters(count: int) -> str:
    """The letters of `count` choices."""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]


def pick(said: str, choices: Sequence[str], count: int | None = None) -> str | None:
    """The letter that the final answer picks, or None when it picks none, or several.

    choices: the texts, when they are known; else `count`, how many letters there are (default: eight).
    A letter comes before a text: "B. red" picks B whatever B says.
    """
    allowed = letters(len(choices) or count or 8)
    said = unwrap(said)
    if len(said.strip("()[]. :*")) == 1:
        said = said.translate(_LOOKALIKES)
    exact = pick_text(said, choices)
    if exact is not None and len(said) > 1:
        return exact
    for pattern in (_ONLY, _LEADING):
        found = pattern.fullmatch(said)
        if found and found[1].upper() in allowed:
            others = {each for each in _LIST_ITEM.findall(said[1:]) if each in allowed} - {found[1].upper()}
            return None if others or _hedged(said, allowed) else found[1].upper()
    if exact is not None:
        return exact
    chosen = _letters_by(_CHOSEN, said, allowed)
    affirmed = " ".join(part for part in re.split(r"(?<=[.;\n])\s|\bbut\b|,", said) if not _DENIED.search(part))
    named = chosen or _letters_by(_NAMED, affirmed, allowed) or _letters_by(_BRACKETED, affirmed, allowed)
    if named:
        return None if len(named) > 1 or _hedged(affirmed, allowed) else named.pop()
    text = _inside(affirmed, choices, allowed)
    standing = _letters_by(_STANDING, affirmed, allowed)
    if text is not None:
        return text
    return standing.pop() if len(standing) == 1 else None


def pick_several(said: str, choices: Sequence[str]) -> frozenset[str]:
    """All letters that the answer picks, for questions with several right choices: "A, C", "A and C", "AC"."""
    allowed = letters(len(choices) or 8)
    said = unwrap(said).strip("().[]:* ")
    found = _SEVERAL.search(said)
    if found:
        return frozenset(each for each in re.sub(r"\band\b", "", found.group()).upper() if each in allowed)
    one = pick(said, choices)
    return frozenset(one) if one else frozenset()


def _letters_by(pattern: re.Pattern[str], text: str, allowed: str) -> set[str]:
    found = {group.upper() for match in pattern.finditer(text) for group in match.groups() if group}
    return found & set(allowed)


def _hedged(said: str, allowed: str) -> bool:
    """Two letters offered, as in `A or B`, before any reason is given."""
    said = _CLAUSE.split(said)[0]
    found = re.search(r"(?<!\w)\(?([A-Z])\)?\s*(?:or|and|and/or|/|,|&)\s*\(?([A-Z])\)?(?!\w)", said)
    return bool(found and found[1] in allowed and found[2] in allowed and found[1] != found[2])


def pick_text(said: str, choices: Sequence[str]) -> str | None:
    """The letter of the one choice whose text, or whose number, the answer is."""
    allowed = letters(len(choices))
    same = [letter for letter, choice in zip(allowed, choices, strict=False) if key(choice) == key(said) != ""]
    if not same:
        value = read_quantity(said)
        options = [(letter, read_quantity(choice)) for letter, choice in zip(allowed, choices, strict=False)]
        if value is not None:
            same = [letter for letter, option in options if option is not None and same_quantity(value, option)]
    return same[0] if len(same) == 1 else None


def _inside(said: str, choices: Sequence[str], allowed: str) -> str | None:
    """The one choice that stands in the sentence; a choice inside a longer one that stands there too does not count."""
    text = key(said)
    present = [
        (letter, key(choice))
        for letter, choice in zip(allowed, choices, strict=False)
        if key(choice) and re.search(rf"(?<!\w){re.escape(key(choice))}(?!\w)", text)
    ]
    present = [each for each in present if not any(each[1] != other[1] and each[1] in other[1] for other in present)]
    return present[0][0] if len(present) == 1 else None
