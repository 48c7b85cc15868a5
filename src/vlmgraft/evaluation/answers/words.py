"""Number words that open a text, as digits: "twenty-three cats", "two thirds", "half a dozen", "a quarter to four"."""

from __future__ import annotations

import re

_SMALL = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
)
_TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
_NUMERALS = {word: at for at, word in enumerate(_SMALL)} | {word: 10 * at for at, word in enumerate(_TENS, 2)}
_ORDINALS = re.findall(r"\w+", "zeroth first second third fourth fifth sixth seventh eighth ninth tenth")
_PARTS = {word: at for at, word in enumerate(_ORDINALS) if at > 2} | {"half": 2, "quarter": 4}
CARDINAL = rf"(?:(?:{'|'.join(_TENS)})(?:[- ](?:{'|'.join(_SMALL[1:10])})\b)?|{'|'.join(_SMALL)})\b"
_SPOKEN = re.compile(
    rf"(?:(an?|{CARDINAL})[ -]hundred\b|(an?)(?= (?:thousand|million|billion)\b))?(?:(?: and)?[ -]?({CARDINAL}))?"
)
_DOZEN = re.compile(r"(?:(\d+)|(half)|an?)? ?(?:an? )?dozen\b|an? (?:pair|couple) of\b")
_PART = re.compile(rf"(?:(\d+) and )?(an? |\d[ -])?({'|'.join(_PARTS)})s?\b")
_PAST = re.compile(r"(?:a )?(half|quarter) (past|after|to) (\w+)")
_HOUR = re.compile(r"(\d{1,2}) ?(?:o'clock|(?=[ap]\.?m\b))")


def in_digits(text: str, *, whole: bool) -> str:
    """Convert the number words that a text begins with to digits; a text without them is unchanged.

    whole: the text is a number with at most its unit, so "third" is a number too.

    >>> in_digits("Twenty-three cats", whole=True), in_digits("two and a half hours", whole=True)
    ('23 cats', '2 1/2 hours')
    """
    if not text[:1].isalnum():
        return text
    lower = text.casefold().replace("’", "'")
    if negative := re.match(r"(?:minus|negative) ", lower):
        number = in_digits(text[negative.end() :], whole=whole)
        return f"-{number}" if number[:1].isdigit() else text
    first = lower.split(" ")[0]
    if whole and first in _ORDINALS:
        return f"{_ORDINALS.index(first)}th{lower[len(first) :]}"
    if (spoken := _SPOKEN.match(lower)) and spoken.group():
        hundreds, one, units = (_value(each or "zero") for each in spoken.groups())
        text = lower = f"{100 * hundreds + one + units}{lower[spoken.end() :]}"
    for pattern, digits in (
        (_PAST, _time),
        (_DOZEN, _count),
        (_PART, _fraction),
        (_HOUR, lambda hour: f"{hour[1]}:00 "),
    ):
        if (match := pattern.match(lower)) and (number := digits(match)):
            return number + lower[match.end() :]
    return text


def _value(words: str) -> int:
    return sum(_NUMERALS.get(word, 1) for word in re.split("[- ]", words))  # "a" hundred


def _time(match: re.Match[str]) -> str:
    """Half past three is 3:30."""
    hour = str(_NUMERALS.get(match[3], match[3]))
    minutes = (30 if match[1] == "half" else 15) * (-1 if match[2] == "to" else 1)
    total = 60 * int(hour) + minutes if hour.isdigit() and len(hour) < 3 else -1
    return f"{total // 60}:{total % 60:02d}" if total > 0 else ""


def _count(match: re.Match[str]) -> str:
    return str(2 if "dozen" not in match.group() else 6 if match[2] else 12 * int((match[1] or "1")[:9]))


def _fraction(match: re.Match[str]) -> str:
    """Fractions such as "two thirds" and "two and a half"; "" for a part without a number, except for "half"."""
    if not match[2] and match[3] != "half":
        return ""
    top = match[2].strip(" -") if match[2] and match[2][0].isdigit() else "1"
    return f"{match[1]} {top}/{_PARTS[match[3]]}" if match[1] else f"{top}/{_PARTS[match[3]]}"
