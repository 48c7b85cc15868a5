"""Reading one number with its unit out of a short text, exactly: `3/4`, `1,234.5 km`, `1.2 × 10^3`, `\\frac12`, `17 %`.

Values are `Fraction`s, so nothing is lost to floating point. What is not one number, such as "17 or 18" or "8 + 9", is
not read. Pure, no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from vlmgraft.evaluation.text import EDGES, unwrap
from vlmgraft.evaluation.units import conversion

LONGEST_NUMBER = 60
LARGEST_EXPONENT = 300
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_POWER = r"(?:\s*(?:\*|x|×)\s*10\s*\^\s*\{?\s*(?P<power>[-+]?\d+)\s*\}?|[eE](?P<e>[-+]?\d+)\b)?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+])?\s*(?P<currency>US\$|[$€£¥₹])?\s*(?P<sign2>[-+])?\s*(?:"
    rf"(?P<whole>\d+\s+|\d+(?=\\frac))?(?:(?P<top>\d+)\s*/\s*(?P<bottom>\d+)"
    rf"|\\frac\s*(?:\{{\s*(?P<top2>-?\d+)\s*\}}\s*\{{\s*(?P<bottom2>\d+)\s*\}}|(?P<top3>\d)\s*(?P<bottom3>\d)))"
    rf"|10\s*\^\s*\{{?\s*(?P<ten>[-+]?\d+)\s*\}}?"
    rf"|(?P<decimal>{_DECIMAL}){_POWER})(?P<rest>(?![\d(^/\\]).*)",
    re.DOTALL,
)
_EUROPEAN = re.compile(r"(?P<whole>\d{1,3}(?:\.\d{3})+|\d+),(?P<part>\d{1,2}|\d{4,})(?!\d)")
_LEAD = re.compile(
    r"^(?:(?:it|this|that|there|the answer|the result|the value|which)\s+(?:is|are|equals)\s+|"
    r"(?:so|thus|therefore|hence|about|approximately|approx\.?|around|roughly|exactly|equals?|"
    r"a total of|only|just)[\s,]+|[≈~≅]\s*|\\approx\s*|=\s*)+",
    re.IGNORECASE,
)
_NAMED = re.compile(
    r"^(?:[a-zA-Z](?:_\{?\w+\}?)?|[A-Z]{2,3}|\\?[a-z]+(?:\([a-z\d]\))?|\\?∠?\s*[A-Z]{1,3})\s*(?:=|≈|\\approx)\s*(?=.)"
)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "k": 3, "million": 6, "mn": 6, "billion": 9, "bn": 9, "trillion": 12}
_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = {
    word: 10 * at
    for at, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}
_UNIT_WORD = re.compile(r"^[^\W\d_]+\.?(?:\s+[^\W\d_]+\.?){0,2}$")


@dataclass(frozen=True)
class Quantity:
    """An exact value and its unit; `decimals` the digits written behind the point, None for fractions and powers.

    unit: "" or as written, lower case; percent is the unit "%", and the value is not divided by 100.
    """

    value: Fraction
    unit: str = ""
    decimals: int | None = None


def read_quantity(text: str) -> Quantity | None:
    """The quantity that `text` is, or None when it is anything else, also two numbers."""
    text = _LEAD.sub("", _NAMED.sub("", _LEAD.sub("", unwrap(text)))).strip().rstrip(EDGES)
    text = re.sub(r"^\((.*)\)$|^\{(.*)\}$", lambda found: found.group(1) or found.group(2) or "", text).strip()
    if not text or len(text) > 4 * LONGEST_NUMBER:
        return None
    spoken = _spoken(text)
    if spoken is not None:
        return spoken
    european = _EUROPEAN.match(text.lstrip("+-$€£ "))
    if european and not re.match(r"[+-]?\d{1,3}(,\d{3})+(?!\d)", text):
        text = text.replace(european.group(), european["whole"].replace(".", "") + "." + european["part"], 1)
    found = _NUMBER.fullmatch(text)
    if not found or len(found.group(0)) - len(found["rest"]) > LONGEST_NUMBER:
        return None
    value, decimals = _value(found)
    unit = _unit(found["rest"])
    if value is None or unit is None:
        return None
    scale, unit = _magnitude(unit)
    negative = (found["sign"] == "-") != (found["sign2"] == "-")
    unit = unit or (found["currency"] or "").casefold()
    return Quantity(-value * scale if negative else value * scale, unit, decimals if scale == 1 else None)


def _value(found: re.Match[str]) -> tuple[Fraction | None, int | None]:
    """Absolute value and decimals of the matched number; None for a zero denominator or an absurd exponent."""
    if found["decimal"] is None and found["ten"] is None:
        top = found["top"] or found["top2"] or found["top3"]
        bottom = found["bottom"] or found["bottom2"] or found["bottom3"]
        if int(bottom) == 0:
            return None, None
        return int(found["whole"] or 0) + Fraction(int(top), int(bottom)), None
    power = int(found["ten"] or found["power"] or found["e"] or 0)
    if abs(power) > LARGEST_EXPONENT:
        return None, None
    digits = (found["decimal"] or "1").replace(",", "")
    decimals = None if power else len(digits.partition(".")[2])
    return Fraction(digits.rstrip(".") or "0") * Fraction(10) ** power, decimals


def _unit(rest: str) -> str | None:
    """What stands behind a number, if it is a unit or a noun or two; None when it says something else."""
    rest = re.sub(r"\s+\^", "^", rest.strip().rstrip(EDGES).casefold())
    rest = re.sub(r"\s*\(.*\)$", "", rest)
    if rest in ("", "%", "°", "percent", "per cent", "percentage points"):
        return "%" if rest[:3] in ("%", "per") else rest
    rest = rest.removeprefix("square ") + "^2" if rest.startswith("square ") else rest
    rest = rest.removeprefix("cubic ") + "^3" if rest.startswith("cubic ") else rest
    rest = re.sub(r"^(?:sq\.?|squared) (\w+)$", r"\1^2", rest)
    rest = re.sub(r"\^\{(-?\d)\}", r"^\1", rest).replace(" per ", "/")
    if (
        re.fullmatch(r"[-–]?[°$€£¥₹μΩω\w]+\.?(?:\^-?\d)?(?:\s*[/*]\s*[\w]+(?:\^-?\d)?)?", rest)
        and not rest[0].isdigit()
    ):
        return re.sub(r"\s", "", rest).lstrip("-")
    words = rest.split()
    if _UNIT_WORD.fullmatch(rest) and not {"or", "and", "to", "not", "is", "but", "if"} & set(words):
        return rest
    return None


def _magnitude(unit: str) -> tuple[Fraction, str]:
    first, _, others = unit.partition(" ")
    if first in _MAGNITUDES:
        return Fraction(10) ** _MAGNITUDES[first], others
    return Fraction(1), unit


def _spoken(text: str) -> Quantity | None:
    words = text.casefold().replace("-", " ").split()
    if not 1 <= len(words) <= 4:
        return None
    total, used = 0, 0
    for word in words:
        if word in _TENS and used == 0:
            total = _TENS[word]
        elif word in _WORDS and (used == 0 or (used == 1 and words[0] in _TENS and 0 < _WORDS.index(word) < 10)):
            total += _WORDS.index(word)
        else:
            break
        used += 1
    unit = _unit(" ".join(words[used:])) if used else None
    if unit is None:
        return None
    scale, unit = _magnitude(unit)
    return Quantity(total * scale, unit, 0)


def same_quantity(said: Quantity, expected: Quantity, precision: int | None = None) -> bool:
    """Whether `said` states `expected`.

    A unit that one side leaves out is not missed; units of one dimension are converted; other units, other nouns
    included, contradict. Values are exact, except that (1) `precision` decimals are enough when given, (2) an expected
    value printed with two or more decimals is met by a longer decimal or a fraction that rounds to it, and (3) an
    expected fraction that no decimal ends is met by three or more right decimals.
    """
    one, other = said.value, expected.value
    if "%" in (said.unit, expected.unit) and said.unit != expected.unit:
        if (said.unit or expected.unit) != "%" and "" not in (said.unit, expected.unit):
            return False
        hundredth = (one / 100 if said.unit == "%" else one, other / 100 if expected.unit == "%" else other)
        return _near(one, said, other, expected, precision) or hundredth[0] == hundredth[1]
    if said.unit and expected.unit and said.unit != expected.unit:
        factors = conversion(said.unit, expected.unit)
        if factors is None:
            return False
        if factors != 1:
            return _near(one * factors, Quantity(one, "", None), other, expected, precision)
    return _near(one, said, other, expected, precision)


def _near(one: Fraction, said: Quantity, other: Fraction, expected: Quantity, precision: int | None) -> bool:
    if one == other:
        return True
    if precision is not None:
        return abs(one - other) <= Fraction(1, 2 * 10**precision)
    places = expected.decimals or 0
    if places >= 2 and (said.decimals is None or said.decimals > places):
        return abs(one - other) <= Fraction(1, 2 * 10**places)
    endless = expected.decimals is None and set(_primes(other.denominator)) - {2, 5}
    return bool(
        endless and (said.decimals or 0) >= 3 and abs(one - other) <= Fraction(1, 2 * 10 ** (said.decimals or 0))
    )


def _primes(number: int) -> list[int]:
    for small in (2, 5):
        while number % small == 0:
            number //= small
    return [number] if number > 1 else []
