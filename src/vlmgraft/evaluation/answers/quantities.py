"""Parsing one number with its unit from a short text, exactly: `3/4`, `1,234.5 km`, `1.2 × 10^3`, `two and a half`.

Values are `Fraction`s, so there is no floating-point error. A text that is not a single number, such as "17 or 18",
"8 + 9" or "3x", is not parsed. Pure, no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from vlmgraft.evaluation.answers.text import EDGES, unwrap
from vlmgraft.evaluation.answers.units import UNITS, conversion, in_degrees, known, stem, unit_of
from vlmgraft.evaluation.answers.words import CARDINAL, in_digits

LONGEST_NUMBER = 60
LARGEST_EXPONENT = 300
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_POWER = r"(?: ?(?:\*|x|×) ?10 ?\^ ?\{? ?(?P<power>[-+]?\d+) ?\}?|[eE](?P<e>[-+]?\d+)\b)?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+])? ?(?P<currency>US\$|[$€£¥₹])? ?(?P<sign2>[-+])? ?(?:"
    rf"(?P<whole>\d+ |\d+(?=\\frac))?(?:(?P<top>\d+) ?/ ?(?P<bottom>\d+)"
    rf"|\\frac ?(?:\{{ ?(?P<top2>-?\d+) ?\}} ?\{{ ?(?P<bottom2>\d+) ?\}}|(?P<top3>\d) ?(?P<bottom3>\d)))"
    rf"|10 ?\^ ?\{{? ?(?P<ten>[-+]?\d+) ?\}}?"
    rf"|(?P<ratio>\d+ ?(?::| to ) ?\d+)(?! ?:)"
    rf"|(?P<decimal>{_DECIMAL}){_POWER})(?:(?P<ordinal>st|nd|rd|th)\b)?(?P<rest>(?![\d(^/\\_]| \().*)",
    re.DOTALL,
)
_FRACTION = ("top", "bottom", "top2", "bottom2", "top3", "bottom3")
_EUROPEAN = re.compile(r"(?P<whole>\d{1,3}(?:\.\d{3})+|\d+),(?P<part>\d{1,2}|\d{4,})(?!\d)")
_SPACED = re.compile(r"[-+$€£ ]{0,4}\d{1,3}(?: \d{3})+(?=[.,]\d|[^\d/ ]| [^\d/]|$)")
_HEDGE = re.compile(
    r"(?:so|thus|therefore|hence|about|approximately|approx\.?|around|roughly|exactly|equal to|equals?|at|only|just|"
    r"still|also|indeed|nearly|almost|simply|given (?:as|by)|(?:calculated|found|estimated) (?:at|as|to be)|"
    r"a total of|us|you|the (?:number|value)|[≈~≅=:]|\\approx(?![a-z]))[ ,]*",
    re.IGNORECASE,
)
_NAME = re.compile(
    r"(?![^=]{1,60}\b(?:is|are|when|if)\b)"
    r"(?:[A-Za-z∠△][A-Za-z0-9_{}' .()-]{0,60}?|\\[a-z]{1,12} ?[A-Za-z0-9{}_]{0,6}) ?(?:=|≈|\\approx(?![a-z])) ?(?=[^ ])"
)
_IS = re.compile(r"^(?:it|this|that|there|the answer|the result|the value|which)(?: (?:is|are)|'s) ", re.IGNORECASE)
_PART = rf"(?:(?:(?:an?|half an?|{CARDINAL})[ -]|[\d.,/]+ ?)(?:[a-z]{{1,12}}\b|[°$€£¢])\.?|[$€£]\d+)"
_COMPOUND = re.compile(rf"{_PART}(?:,? and |, ?| )(?:{_PART}|(?:a )?half)(?:(?:,? and |, ?| ){_PART})?", re.IGNORECASE)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "k": 3, "million": 6, "mn": 6, "billion": 9, "bn": 9, "trillion": 12}


@dataclass(frozen=True)
class Quantity:
    """An exact value and its unit; `decimals`: number of digits after the point, None for fractions and powers.

    unit: "" or as written, lower case; percent is the unit "%", and the value is not divided by 100.
    clock: minutes since midnight where the text may be a time of day ("7:45"; its unit is then "", "am" or "pm").
    """

    value: Fraction
    unit: str = ""
    decimals: int | None = None
    clock: int | None = None


def without_name(text: str) -> str:
    """Remove names and hedges around a value: "Area = 24" to "24", "so about 7" to "7", "5 = s" to "5"."""
    for _ in range(4):
        text = _IS.sub("", text)
        match = _HEDGE.match(text) or _NAME.match(text)
        text = text[match.end() :] if match else text
    return re.sub(r" ?= ?[a-zA-Z]$", "", text)


def read_quantity(text: str) -> Quantity | None:
    """Parse `text` as one quantity; None for anything else, including two numbers."""
    if len(text) > 20 * LONGEST_NUMBER:
        return None
    text = without_name(unwrap(text)).strip().rstrip(EDGES)
    text = re.sub(r"^\(([^,]*)\)$|^\{(.*)\}$", lambda inner: inner[1] or inner[2] or "", text).strip()
    if not text or len(text) > 4 * LONGEST_NUMBER or re.search(r"\d!", text):
        return None
    compound = _COMPOUND.fullmatch(text)
    return (_sum(text) if compound else None) or _read(text, whole=True)


def leading_quantity(text: str) -> Quantity | None:
    """The quantity that a text begins with ("18.6 cm to two decimal places"); its unit only if that is known."""
    text = without_name(text[: 6 * LONGEST_NUMBER].strip())
    compound = _COMPOUND.match(text)
    return (_sum(compound.group()) if compound else None) or (_read(text, whole=False) if text else None)


def summed(text: str) -> Quantity | None:
    """The compound quantity that a text begins with, if it includes all numbers of the text: "1 hr 45 min in all"."""
    compound = _COMPOUND.match(text)
    return _sum(compound.group()) if compound and not re.search(r"\d", text[compound.end() :]) else None


def _sum(text: str) -> Quantity | None:
    """A quantity in several units of one dimension, each smaller than the one before: 1 hour and 30 minutes."""
    parts = re.split(r",? and |, | (?=\d)", re.sub(r"^an? ", "1 ", text))
    found = [each for part in parts if (each := _read(part.strip(EDGES), whole=True)) is not None]
    if len(found) < len(parts) or not all(known(each.unit) for each in found[:-1]):
        return None
    if not found[-1].unit and found[-1].value == Fraction(1, 2):  # "an hour and a half"
        return Quantity(sum((each.value for each in found), Fraction(0)), found[0].unit)
    sizes = [UNITS.get(stem(each.unit), ("", Fraction(0))) for each in found]
    if any(one[0] != other[0] or one[1] <= other[1] for one, other in pairwise(sizes)):
        return None
    total = sum((each.value * size for each, (_, size) in zip(found, sizes, strict=True)), Fraction(0))
    return Quantity(total / sizes[0][1], found[0].unit) if len(found) > 1 else None


def _read(text: str, *, whole: bool) -> Quantity | None:
    text = in_digits(text, whole=whole)
    if whole and (spaced := _SPACED.match(text)):  # 12 345 km
        text = spaced.group().replace(" ", "") + text[spaced.end() :]
    european = _EUROPEAN.match(text.lstrip("+-$€£ ")) if whole else None
    if european and not re.match(r"[+-]?\d{1,3}(,\d{3})+(?!\d)", text):
        text = text.replace(european.group(), european["whole"].replace(".", "") + "." + european["part"], 1)
    match = _NUMBER.fullmatch(text)
    if not match or len(match.group(0)) - len(match["rest"]) > LONGEST_NUMBER:
        return None
    value, decimals = _value(match)
    rest = match["rest"]
    glued = re.match(r"[a-zA-Z]{1,2}(?![a-zA-Z])", rest)
    if value is None or (glued and not known(glued.group().casefold()) and glued.group() not in _MAGNITUDES):
        return None
    unit = _unit(rest) if whole else _leading_unit(rest)
    if unit is None:
        return None
    first, _, others = unit.partition(" ")
    scale = 10 ** _MAGNITUDES.get(first, 0)
    unit = (others if first in _MAGNITUDES else unit) or (match["currency"] or "").casefold()
    negative = (match["sign"] == "-") != (match["sign2"] == "-")
    time = re.fullmatch(r"([01]?\d|2[0-4]):([0-5]\d)", match["ratio"] or "")
    clock = 60 * int(time[1]) + int(time[2]) if time else None
    return Quantity(-value * scale if negative else value * scale, unit, decimals if scale == 1 else None, clock)


def _value(match: re.Match[str]) -> tuple[Fraction | None, int | None]:
    """Absolute value and decimals of the matched number; None for a zero denominator or too many digits."""
    fraction = [match[name] for name in _FRACTION if match[name]] or re.findall(r"\d+", match["ratio"] or "")
    if len(fraction) == 2:
        top, bottom = fraction
        if max(map(len, (top, bottom, match["whole"] or ""))) > LONGEST_NUMBER or int(bottom) == 0:
            return (Fraction(top), None) if bottom == "00" else (None, None)
        return int(match["whole"] or 0) + Fraction(int(top), int(bottom)), None
    power = match["ten"] or match["power"] or match["e"] or "0"
    digits = (match["decimal"] or "1").replace(",", "")
    if len(power) > 4 or abs(int(power)) > LARGEST_EXPONENT or len(digits) > LONGEST_NUMBER:
        return None, None
    decimals = None if int(power) else len(digits.partition(".")[2])
    return Fraction(digits.rstrip(".") or "0") * Fraction(10) ** int(power), decimals


def _unit(rest: str) -> str | None:
    rest = rest.strip().rstrip(EDGES).casefold().replace(" ^", "^")
    return unit_of(re.sub(r" ?\([^()]*\)$|(?<=^[ap])\.(?=m$)", "", rest))


def without_unit(expression: str) -> str:
    """An expression without its trailing unit: "36π cm^3" to "36π", "4 square metres" to "4"."""
    match = re.search(r"(?<=[^ ]) ?((?:square |cubic )?[a-zA-Z°μΩ]+)(?: ?\^ ?\{? ?[23] ?\}?)?$", expression[-40:])
    if match is None:
        return expression
    word = stem(match[1].split(" ")[-1].casefold())
    is_unit = word == "unit" or (word in UNITS and (len(word) > 1 or match.group().startswith(" ")))
    return expression[: -len(match.group())] if is_unit else expression


def _leading_unit(rest: str) -> str | None:
    """The known unit at the start of a text, "" for other words; None if an expression continues: "2 × 3 × 5"."""
    words = re.sub(r"^ (?:of )?an? ", " ", rest.casefold()).replace(" ^", "^").split(" ")[:3]
    if re.match(r" ?(?![-/*][a-zA-Z])[-+*/×÷=^≤≥<>(]|\.\d|, ?\d| ?\\(?:frac|sqrt|pi|le|ge)", rest):
        return None
    for count in (2, 1):
        unit = _unit(" ".join(words[:count]).strip()) or ""
        first = unit.split(" ")[0]
        if first in _MAGNITUDES:
            return first
        if unit in ("%", "am", "pm") or (known(re.split(r"[/*^]", unit)[0]) and unit != "in"):
            return unit
    return ""


def same_quantity(stated: Quantity, expected: Quantity, precision: int | None = None) -> bool:
    """Whether `stated` is the expected quantity.

    A unit that only one side has is ignored; units of one dimension and temperatures are converted; other units or
    nouns that differ are a mismatch. Values must be equal, except that (1) `precision` decimals suffice if given, (2)
    an expected decimal of at least three digits matches a longer decimal or a fraction that rounds to it, and (3) an
    expected fraction without a finite decimal form matches three or more correct decimals. Times of day must agree to
    the minute.
    """
    value, target = stated.value, expected.value
    if stated.clock is not None and expected.clock is not None:
        return _same_time(stated, expected)
    if "%" in (stated.unit, expected.unit) and stated.unit != expected.unit:
        if "" not in (stated.unit, expected.unit):
            return False
        hundredth = (value / 100 if stated.unit == "%" else value, target / 100 if expected.unit == "%" else target)
        return _near(value, stated, target, expected, precision) or hundredth[0] == hundredth[1]
    if stated.unit and expected.unit and stated.unit != expected.unit:
        factors = conversion(stated.unit, expected.unit)
        if factors is None:
            degrees = in_degrees(value, stated.unit, expected.unit)
            written = stated if degrees == value else Quantity(value, "", None)
            return degrees is not None and _near(degrees, written, target, expected, precision)
        if factors != 1:
            return _near(value * factors, Quantity(value, "", None), target, expected, precision)
    return _near(value, stated, target, expected, precision)


def _same_time(stated: Quantity, expected: Quantity) -> bool:
    """7:45 pm equals 19:45, and also 7:45 if one side has neither am nor pm."""
    one, other = ((each.clock or 0, each.unit) for each in (stated, expected))
    if (one[1] in ("am", "pm")) != (other[1] in ("am", "pm")):
        bare, marked = sorted((one, other), key=lambda time: time[1] in ("am", "pm"))
        if bare[0] < 13 * 60:
            return bare[0] % 720 == marked[0] % 720
    times = [clock % 720 + 720 * (half == "pm") if half in ("am", "pm") else clock for clock, half in (one, other)]
    return times[0] == times[1]


def _near(value: Fraction, stated: Quantity, target: Fraction, expected: Quantity, precision: int | None) -> bool:
    if value == target:
        return True
    if precision is not None:
        return abs(value - target) <= Fraction(1, 2 * 10**precision)
    places = expected.decimals or 0
    precise = places >= 2 or (places == 1 and abs(target) >= 10)  # three digits: 78.54 is 78.5, but 0.51 is not 0.5
    if precise and (stated.decimals is None or stated.decimals > places):
        return abs(value - target) <= Fraction(1, 2 * 10**places)
    endless = expected.decimals is None and pow(10, LARGEST_EXPONENT) % target.denominator
    written = stated.decimals or 0
    return bool(endless and written >= 3 and abs(value - target) <= Fraction(1, 2 * 10**written))
