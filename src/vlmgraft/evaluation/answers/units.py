"""Units of measure: their names, and the exact factor from one to another. Pure, no torch."""

from __future__ import annotations

import re
from fractions import Fraction

_TABLE = """
length: mm millimeter millimetre 1/1000, cm centimeter centimetre 1/100, dm decimeter 1/10, m meter metre 1
length: km kilometer kilometre 1000, in inch inches 0.0254, ft foot feet 0.3048, yd yard 0.9144, mile mi 1609.344
length: nm nanometer 1/1000000000, μm micrometer 1/1000000
mass: mg milligram 1/1000000, g gram 1/1000, kg kilogram 1, lb lbs pound 0.45359237, oz ounce 0.028349523125
mass: t ton tonne 1000
time: ms millisecond 1/1000, s sec second 1, min minute 60, h hr hour 3600, day 86400, week 604800
years: month 1/12, year yr 1, decade 10, century 100
volume: ml milliliter millilitre 1/1000, cl 1/100, l liter litre 1
angle: ° degree deg °t 1, rad radian 57.29577951308232
dollar: $ us$ dollar usd 1, ¢ cent cents 1/100
euro: € euro eur 1
sterling: £ gbp 1, penny pence 1/100
yen: ¥ yen jpy 1
rupee: ₹ rupee inr rs 1
celsius: °c celsius 1
fahrenheit: °f fahrenheit 1
kelvin: kelvin 1
force: n newton 1, kn 1000
energy: j joule 1, kj 1000, ev electronvolt 1/6241509074460762624
power: w watt 1, kw 1000
voltage: v volt 1, mv 1/1000, kv 1000
current: a amp ampere 1, ma 1/1000
resistance: Ω ω ohm 1, kω 1000
frequency: hz hertz 1, khz 1000, mhz 1000000
pressure: pa pascal 1, kpa 1000, atm 101325
"""
UNITS: dict[str, tuple[str, Fraction]] = {
    name: (line.partition(":")[0], Fraction(entry.split()[-1]))
    for line in _TABLE.strip().splitlines()
    for entry in line.partition(":")[2].split(",")
    for name in entry.split()[:-1]
}
"""Name in lower case → (dimension, size in the dimension's base unit)."""
_LONG = re.compile(r"^(square|cubic|sq\.?|squared) (\w+)$")


def unit_of(rest: str) -> str | None:
    """The text after a number as the key of a unit, if it is a unit or a short noun phrase ("square metres" as
    "metres^2"); None for other texts."""
    rest = re.sub(r"^(?:of )?an? |^degrees? (?=[cf])", lambda m: "°" if m[0][0] == "d" else "", rest)
    if rest in ("", "%", "°", "percent", "per cent", "percentage points"):
        return "%" if rest[:3] in ("%", "per") else rest
    rest = _LONG.sub(lambda m: m[2] + ("^3" if m[1] == "cubic" else "^2"), rest)
    rest = re.sub(r"\^\{(-?\d)\}", r"^\1", rest).replace(" per ", "/").replace("°celsius", "°c")
    if re.fullmatch(r"units?\.?(?:\^\d)?", rest):
        return ""
    if re.fullmatch(r"[-–]?[°$€£¥₹¢μΩω\w]+\.?(?:\^-?\d)?(?: ?[/*] ?\w+(?:\^-?\d)?)?", rest) and not rest[0].isdigit():
        return rest.replace(" ", "").lstrip("-") if rest not in _NO_NOUN else None
    if re.fullmatch(r"[^\W\d_]+\.?(?: [^\W\d_]+\.?){0,2}", rest) and not _NO_NOUN & set(rest.split()):
        return rest
    return None


_NO_NOUN = frozenset(re.findall(r"\w+", "or and to not is but if of than from by plus minus times x π"))


def known(word: str) -> bool:
    """Whether a word, singular or plural, names a unit of the table."""
    return stem(word) in UNITS


def stem(unit: str) -> str:
    """The name of a unit in the singular."""
    unit = unit.rstrip(".")
    if unit in UNITS:
        return unit
    return unit[:-1] if len(unit) > 2 and unit.endswith("s") and not unit.endswith("ss") else unit


def conversion(unit: str, wanted: str) -> Fraction | None:
    """The factor from `unit` to `wanted`; 1 for two names of one unit, None for incompatible units."""
    if stem(unit) == stem(wanted) or unit.endswith(f" {wanted}") or wanted.endswith(f" {unit}"):
        return Fraction(1)
    factor = Fraction(1)
    parts, wanted_parts = (re.split(r"([/*])", each) for each in (unit, wanted))
    if parts[1::2] != wanted_parts[1::2]:
        return None
    for at, pair in enumerate(zip(parts[::2], wanted_parts[::2], strict=True)):
        (name, power), (name2, power2) = (_power(each) for each in pair)
        size, size2 = UNITS.get(stem(name)), UNITS.get(stem(name2))
        if power != power2 or size is None or size2 is None or size[0] != size2[0]:
            return None
        ratio = (size[1] / size2[1]) ** power
        factor = factor / ratio if at and parts[1] == "/" else factor * ratio
    return factor


def in_degrees(value: Fraction, unit: str, wanted: str) -> Fraction | None:
    """A temperature in another unit; degrees without a scale are of the wanted one. None for other units."""
    kinds = [UNITS.get(stem(each), ("",))[0] for each in (unit, wanted)]
    scales = [_TEMPERATURES[kind] for kind in kinds if kind in _TEMPERATURES]
    if len(scales) == 2:
        (size, zero), (size2, zero2) = scales
        return (value - zero) * size / size2 + zero2
    return value if scales and "angle" in kinds and stem(unit if kinds[0] == "angle" else wanted) in _DEGREES else None


_TEMPERATURES = {
    "celsius": (Fraction(1), Fraction(0)),
    "fahrenheit": (Fraction(5, 9), Fraction(32)),
    "kelvin": (Fraction(1), Fraction("273.15")),
}
"""Size of a degree in °C, and the value at 0 °C."""
_DEGREES = ("°", "degree", "deg")


def _power(unit: str) -> tuple[str, int]:
    name, _, power = unit.partition("^")
    return name, int(power) if re.fullmatch(r"-?\d", power) else 1
