"""Units of measure by their names, and the exact factor from one to another. Pure, no torch."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS: dict[str, tuple[str, Fraction]] = {}


def _define(dimension: str, **units: str | int) -> None:
    for names, factor in units.items():
        for name in names.split("__"):
            _UNITS[name] = (dimension, Fraction(factor))


_define("length", mm__millimeter__millimetre="1/1000", cm__centimeter__centimetre="1/100", dm__decimeter="1/10")
_define("length", m__meter__metre=1, km__kilometer__kilometre=1000, inch__inches="0.0254", ft__foot__feet="0.3048")
_define("length", yd__yard="0.9144", mile__mi="1609.344", nm__nanometer="1/1000000000", μm__micrometer="1/1000000")
_define("mass", mg__milligram="1/1000000", g__gram="1/1000", kg__kilogram=1, lb__lbs__pound="0.45359237")
_define("mass", oz__ounce="0.028349523125", t__ton__tonne=1000)
_define("time", ms__millisecond="1/1000", s__sec__second=1, min__minute=60, h__hr__hour=3600, day=86400, week=604800)
_define("years", month="1/12", year__yr=1, decade=10, century=100)
_define("volume", ml__milliliter__millilitre="1/1000", cl="1/100", l__liter__litre=1)
_define("angle", **{"°__degree__deg": 1}, rad__radian="57.29577951308232")
_define("dollar", **{"$__us$__dollar__usd": 1}, cent__cents="1/100")
_define("euro", **{"€__euro__eur": 1})
_define("sterling", **{"£__gbp": 1})
_define("yen", **{"¥__yen__jpy": 1})
_define("rupee", **{"₹__rupee__inr__rs": 1})
_define("celsius", **{"°c__celsius__degrees celsius__degree celsius": 1})
_define("fahrenheit", **{"°f__fahrenheit__degrees fahrenheit": 1})
_define("kelvin", kelvin=1)
_define("force", n__newton=1, kn="1000")
_define("energy", j__joule=1, kj=1000, ev__electronvolt="1/6241509074460762624")
_define("power", w__watt=1, kw=1000)
_define("voltage", v__volt=1, mv="1/1000", kv=1000)
_define("current", a__amp__ampere=1, ma="1/1000")
_define("resistance", Ω__ω__ohm=1, kω="1000")
_define("frequency", hz__hertz=1, khz=1000, mhz=1000000)
_define("pressure", pa__pascal=1, kpa=1000, atm=101325)


def conversion(unit: str, wanted: str) -> Fraction | None:
    """The factor from `unit` to `wanted`; 1 for two names of one thing, None for different things."""
    if _stem(unit) == _stem(wanted) or unit.endswith(f" {wanted}") or wanted.endswith(f" {unit}"):
        return Fraction(1)
    factor = Fraction(1)
    parts = [re.split(r"([/*])", each) for each in (unit, wanted)]
    if len(parts[0]) != len(parts[1]) or parts[0][1::2] != parts[1][1::2]:
        return None
    for at, (one, other) in enumerate(zip(parts[0][::2], parts[1][::2], strict=True)):
        (name, power), (name2, power2) = (_power(each) for each in (one, other))
        found, found2 = _UNITS.get(_stem(name)), _UNITS.get(_stem(name2))
        if power != power2 or found is None or found2 is None or found[0] != found2[0]:
            return None
        ratio = (found[1] / found2[1]) ** power
        factor = factor / ratio if at and parts[0][1] == "/" else factor * ratio
    return factor


def _power(unit: str) -> tuple[str, int]:
    name, _, power = unit.partition("^")
    return name, int(power) if re.fullmatch(r"-?\d", power) else 1


def _stem(unit: str) -> str:
    unit = unit.rstrip(".")
    if unit in _UNITS:
        return unit
    return unit[:-1] if len(unit) > 2 and unit.endswith("s") and not unit.endswith("ss") else unit
