"""Whether two short answers are the same: as texts, quantities, lists or expressions. Pure, no torch."""

from __future__ import annotations

import re
from fractions import Fraction

from vlmgraft.evaluation import algebra
from vlmgraft.evaluation.quantities import Quantity, read_quantity, same_quantity
from vlmgraft.evaluation.text import key, unwrap

_ARTICLE = re.compile(r"^(?:a|an|the)\s+")
_STATES = re.compile(
    r"\b(?:there (?:is|are)|it (?:is|does)|i (?:can )?see|the image (?:shows|contains)|they are|"
    r"(?:is|are) (?:visible|present|shown))\b"
)
_VERB = re.compile(r"\b(?:is|are|does|do|isn't|aren't|doesn't|don't)\b")
_LISTING = re.compile(r"\s*(?:,\s*(?:and|or)\s|;|\n|\band\b|\bor\b|&|、|，|,(?!\d{3}(?!\d))|(?<=\d),(?=\s))\s*")
_SYMBOLS = re.compile(r"\\[a-zA-Z]+|[\^_=+*/()<>≤≥√π∞|{}-]|\d")
_FUNCTIONS = re.compile(r"\\[a-zA-Z]+|\b(?:sin|cos|tan|sec|csc|cot|log|ln|exp|sqrt|pi|max|min|mod)\b")
_ARITHMETIC = re.compile(r"^[\d\s.,()]*\d\s*[)\s]*(?:[-+*×÷]\s*[(\s]*\d[\d\s.,()]*)+$")


def same_answer(said: str, expected: str) -> bool:
    """Equal up to case, surrounding punctuation and white space; single numbers by value ("17.0" is "17")."""
    one, other = key(said), key(expected)
    if one == other:
        return bool(other)
    numbers = read_quantity(one), read_quantity(other)
    return all(number is not None and number.decimals is not None and not number.unit for number in numbers) and (
        numbers[0].value == numbers[1].value  # type: ignore[union-attr]
    )


def same_value(said: str, expected: str, precision: int | None = None) -> bool:
    """Whether two short answers are the same: as texts, as quantities, as lists, or as expressions."""
    one, other = (_ARTICLE.sub("", key(text)) for text in (said, expected))
    if one == other:
        return bool(other)
    mine, wanted = read_quantity(said), read_quantity(expected)
    if mine is not None and wanted is not None:
        return same_quantity(mine, wanted, precision)
    listed = _same_list(said, expected, precision)
    if listed is not None:
        return listed
    return _same_expression(said, expected, wanted, precision)


def yes_or_no(said: str) -> bool | None:
    """The stance of an answer to a yes-or-no question; None when it takes none, or both."""
    text = key(said)
    if re.fullmatch(r"(?:(?:yes|no|or|and)\b\W*)+", text) and "yes" in text and "no" in text:
        return None
    first = re.match(r"(yes|yeah|yep|true|correct|no|nope|false|incorrect)\b", text)
    if first:
        both = re.match(r"(?:yes|no)\s*(?:/|or|and)\s*(?:yes|no)\b", text)
        return None if both else first[1] in ("yes", "yeah", "yep", "true", "correct")
    stances = set(re.findall(r"\b(yes|no)\b", re.sub(r"\bno (?=[a-z])", "none ", text)))
    if len(stances) == 1:
        return stances == {"yes"}
    if stances:
        return None
    denied = bool(re.search(r"\b(?:not|no|none|neither|without)\b|n't\b", text))
    if _STATES.search(text) or (denied and (_VERB.search(text) or len(text.split()) <= 3)):
        return not denied
    return None


def _items(text: str) -> tuple[list[str], bool] | None:
    """The members of a list and whether brackets give it an order; None for a single thing."""
    text = unwrap(text).strip(" .")
    text = re.sub(r"^[a-zA-Z]\s*(?:=|∈|\\in)\s*", "", text)
    text = text.replace("\\{", "{").replace("\\}", "}")
    ordered = bool(re.fullmatch(r"[(\[].*[)\]]", text))
    inner = text[1:-1] if re.fullmatch(r"[(\[{].*[)\]}]", text) else text
    parts = [
        re.sub(r"^[a-zA-Z](?:_\{?\d\}?)?\s*=\s*", "", part.strip()) for part in _LISTING.split(inner) if part.strip()
    ]
    return (parts, ordered) if len(parts) > 1 else None


def _same_list(said: str, expected: str, precision: int | None) -> bool | None:
    """Lists member by member; in order when brackets give one, else in any order. None when neither is a list."""
    wanted, mine = _items(expected), _items(said)
    if wanted is None or mine is None:
        grouped = re.compile(r"\d,\d{3}")  # one number with a separator, or two numbers: the same marks
        if wanted is not None and grouped.search(said):
            mine = (re.split(r"\s*,\s*", unwrap(said).strip("()[]{} .")), False)
        elif mine is not None and grouped.search(expected):
            wanted = (re.split(r"\s*,\s*", unwrap(expected).strip("()[]{} .")), False)
        else:
            return None if wanted is None and mine is None else False
    assert wanted is not None and mine is not None
    if len(wanted[0]) != len(mine[0]):
        return False
    if wanted[1]:
        return all(same_value(one, other, precision) for one, other in zip(mine[0], wanted[0], strict=True))
    left = list(mine[0])
    for other in wanted[0]:
        match = next((one for one in left if same_value(one, other, precision)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _mathematical(text: str) -> bool:
    """Symbols and at most two letters in a row, commands and functions apart: no words that algebra would multiply."""
    return bool(_SYMBOLS.search(text)) and not re.search(r"[a-zA-Z]{3}", _FUNCTIONS.sub(" ", text))


def _same_expression(said: str, expected: str, wanted: Quantity | None, precision: int | None) -> bool:
    """Equal as expressions. Sums and products of plain numbers that were not worked out do not answer with a number."""
    one, other = (unwrap(text).rstrip(" .").replace("π", "\\pi ").replace("√", "\\sqrt ") for text in (said, expected))
    if not (_mathematical(one) and _mathematical(other)):
        return False
    if wanted is not None and (_ARITHMETIC.match(one) or re.search(r"[<>≤≥≠=]|\\(?:le|ge|lt|gt|ne)", one)):
        return False
    found = algebra.compare(_typeset(one), _typeset(other))
    if found.same or found.value is None or wanted is None:
        return bool(found.same)
    return same_quantity(Quantity(Fraction(found.value)), wanted, precision)


def _typeset(expression: str) -> str:
    expression = re.sub(r"(?<!\\)\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", expression)
    return re.sub(r"(?<!\\)\b(sqrt|pi|sin|cos|tan|log|ln|exp)\b", r"\\\1", expression)
