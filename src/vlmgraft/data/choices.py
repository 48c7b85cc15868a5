"""Lettered choices in the layouts of published data sets, and which of them a reference names."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmgraft.errors import DataError

MOST_CHOICES = 26
"""Choices are lettered from A to Z."""
LABELS = ("label", "key", "letter", "id")
TEXTS = ("text", "value", "content", "choice", "option")
"""Keys of a choice's letter and of its text in objects, as ARC, CommonsenseQA and bigbio have them."""
_ITEM = re.compile(r"(?:^|(?<=[\n ;]))\(?([A-Z])(?:\)|[.:](?=[ \\$\d(]|(?<=[.:])\w)) ?")
_PREFIX = re.compile(r"\(?([A-Za-z])(?:\)\s*|[.:]\s+)(?=\S)")
_QUOTED = r"""(?:'[^'\\]*'|"[^"\\]*")"""
_ARRAY = re.compile(rf"\[\s*{_QUOTED}(?:\s+{_QUOTED})+\s*\]")
"""numpy's text of an array of texts, which Python would read as one joined text."""


@dataclass(frozen=True)
class Choices:
    """Texts in the order of their letters, "" for a letter without text. labels: other names of a choice (a number, or
    the text with its letter) → its index. numbered: the labels are numbers."""

    texts: tuple[str, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    numbered: bool = False

    def letter_of(self, answer: Any) -> str | None:
        """The letter of the choice that an answer names by its label or by its index, from 0; None if the answer is a
        letter or a text. Raises DataError if it names two choices, or an index without a choice."""
        text = number_text(answer)
        if text in self.labels:
            named = self.labels[text]
            if text in self.texts and self.texts[named] != text:
                raise DataError(f"answer {text!r} is the label of one choice and the text of another; give its letter")
            return letters(MOST_CHOICES)[named]
        same = [at for at, choice in enumerate(self.texts) if _same(text, choice)]
        if len(same) == 1 and text not in self.texts:
            return letters(MOST_CHOICES)[same[0]]
        index = self.index_of(answer)
        if index is None:
            return None
        if self.numbered or not 0 <= index < len(self.texts) or not self.texts[index]:
            raise DataError(f"answer {text!r} is none of the {len(self.texts)} choices, by text or counted from 0")
        return letters(MOST_CHOICES)[index]

    def index_of(self, answer: Any) -> int | None:
        """The number that an answer is, if it can only be an index: a whole number that is no choice's text. A digit
        among choices that begin with numbers is a text."""
        if not self.texts or isinstance(answer, bool):
            return None
        text = number_text(answer)
        whole = isinstance(answer, int | float) or not any(re.match(r"\W*\d", choice) for choice in self.texts)
        if not whole or not re.fullmatch(r"-?\d{1,9}", text.strip()):
            return None
        return None if any(_same(text, choice) for choice in self.texts) else int(text)


def number_text(value: Any) -> str:
    """The text of a value; a whole float (pandas' integers beside missing values) without its decimals."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return str(int(value) if whole else value)


def missing(value: Any) -> bool:
    """Whether a cell is empty: None, a blank text or list, or the NaN that pandas writes."""
    return value is None or value == "" or value == [] or (isinstance(value, float) and math.isnan(value))


def refuse_counts_from_one(answers: Iterable[tuple[Choices, Any]], where: object) -> None:
    """Raise DataError if the indices among a file's answers reach the number of choices and are never 0."""
    pairs = [
        (choices, index)
        for choices, answer in answers
        if not choices.numbered and (index := choices.index_of(answer)) is not None
    ]
    if min((index for _, index in pairs), default=0) > 0 and any(len(one.texts) == index for one, index in pairs):
        raise DataError(f"{where}: the answers number the choices from 1; number them from 0, or give their letters")


def read_choices(value: Any) -> Choices:
    """Choices from a list of texts, of label and text, or of objects with both; from an object of label → text or of
    two lists; from such a value in text form (MMMU); or from lettered texts in one line (WeMath: "A. 3; B. 4").

    Choices stand at their letters or numbers, and letters in front of the texts are removed. A letter without a text
    keeps its place. Raises DataError, without naming the row, for a value that is none of these.
    """
    pairs = [] if missing(value) else _pairs(_parsed(value) if isinstance(value, str) else value)
    for _, text in pairs:
        if isinstance(text, Mapping | list | tuple | bytes) or callable(text):
            raise DataError(f"a choice is no text: {text!r:.60}")
    texts = ["" if missing(text) else str(text) for _, text in pairs]
    named: dict[str, int] = {}
    if any(label is not None for label, _ in pairs):
        names = [number_text(label).strip(" ().:") for label, _ in pairs]
        places = _places(names)
        named = dict(zip(names, places, strict=True))
        given = dict(zip(places, texts, strict=True))
        texts = [given.get(place, "") for place in range(max(places) + 1)]
    while texts and not texts[-1]:
        texts.pop()
    if len(texts) > MOST_CHOICES:
        raise DataError(f"{len(texts)} choices; at most {MOST_CHOICES} can be lettered")
    prefixes = [_PREFIX.match(text) for text in texts]
    if len(texts) > 1 and [match[1].upper() for match in prefixes if match] == list(letters(len(texts))):
        named |= {text: index for index, text in enumerate(texts)}
        texts = [text[match.end() :] for text, match in zip(texts, prefixes, strict=True) if match]
    numbered = any(label.isdecimal() for label in named)
    return Choices(tuple(texts), {name: at for name, at in named.items() if not _letter(name)}, numbered)


def _parsed(text: str) -> Any:
    """A value in text form, as JSON, Python or numpy write it, or the texts behind letters in one line."""
    text = text.strip()
    if _ARRAY.fullmatch(text):
        return [quoted[1:-1] for quoted in re.findall(_QUOTED, text)]
    if text.startswith(("[", "{", "(")):
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    listed = lettered(text)
    if not listed and text:
        raise DataError(f"{text!r:.60} is neither a list nor lettered texts; write a list")
    return listed


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    """(label, text) of each choice; the label is None where there is none."""
    if isinstance(value, Mapping):
        texts = next((value[key] for key in TEXTS if isinstance(value.get(key), list | tuple)), None)
        labels = next((value[key] for key in LABELS if isinstance(value.get(key), list | tuple)), None)
        if texts is None and labels is None:
            return list(value.items())
        if texts is None or (len(value) > 1 and (labels is None or len(labels) != len(texts))):
            raise DataError(f"the choices' labels and texts differ in number: {value!r:.60}")
        return list(zip(labels or [None] * len(texts), texts, strict=True))
    if not isinstance(value, list | tuple):
        raise DataError(f"{value!r:.60} is no list; write a list")
    if value and all(isinstance(each, Mapping) for each in value):
        return [_labelled(each) for each in value]
    if value and all(isinstance(each, list | tuple) and len(each) == 2 and _letter(each[0]) for each in value):
        return [(label, text) for label, text in value]
    return [(None, each) for each in value]


def _labelled(choice: Mapping[str, Any]) -> tuple[Any, Any]:
    label, text = (next((key for key in keys if key in choice), None) for keys in (LABELS, TEXTS))
    if text is None:
        raise DataError(f"a choice has no text: {dict(choice)!r:.60}; its keys may be {', '.join(LABELS + TEXTS)}")
    return (None if label is None else choice[label]), choice[text]


def _places(names: Sequence[str]) -> list[int]:
    """The index that each label stands for: letters, or numbers from 0 or 1."""
    places: list[int] = []
    if all(map(_letter, names)):
        places = [ord(name.upper()) - ord("A") for name in names]
    elif all(name.isdecimal() and len(name) < 3 for name in names):
        places = [int(name) - min(1, *map(int, names)) for name in names]
    if not places or len(set(places)) < len(places):
        raise DataError(f"the choices' labels are no letters or numbers: {', '.join(names)[:60]}; write a list")
    return places


def _letter(name: Any) -> bool:
    return bool(re.fullmatch(r"[\s(]{0,2}[A-Za-z][\s).:]{0,2}", str(name)))


def _same(number: str, choice: str) -> bool:
    try:
        return float(number) == float(choice)
    except ValueError:
        return False


def letters(count: int) -> str:
    """The letters of `count` choices, at most 26 of them."""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]


def lettered(text: str) -> tuple[str, ...]:
    """The texts after A, B, C … in order, as in "A. 3; B. 4" or one per line; () if the letters form no sequence."""
    items: list[re.Match[str]] = []
    for match in _ITEM.finditer(text):
        if match[1] == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[len(items) : len(items) + 1]:
            items.append(match)
    ends = [match.start() for match in items[1:]] + [len(text)] if items else []
    texts = tuple(text[match.end() : end].strip(" ;,\n") for match, end in zip(items, ends, strict=True))
    return texts if len(texts) > 1 else ()
