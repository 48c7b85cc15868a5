"""Small pieces of SVG: escaped text, number formats, axis ticks and scales. No drawing library, no torch.

Colours are CSS variables of the page (`--s0` … `--s7` for series, `--low`, `--zero`, `--high` for heat maps), so that
one picture serves light, dark and print. What the pointer reads is in `data-tip`; a `<title>` says it without script.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass


def escape(text: object) -> str:
    """Text for HTML and SVG, attributes included."""
    return html.escape(str(text), quote=True)


def sentence(text: str) -> str:
    """The text as a sentence: a capital first, a full stop last."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: `digits` significant digits, no trailing zeros, no exponent between 1e-4 and 1e6."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    places = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    said = f"{value:,.{min(places, 6)}f}"
    said = said.rstrip("0").rstrip(".") if "." in said else said
    return said.replace("-", "−")


def coordinate(value: float) -> str:
    """A coordinate with one decimal, which keeps pages small."""
    return f"{value:.1f}".removesuffix(".0")


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers inside [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(one * power for one in (1, 2, 5, 10) if one * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], thinned to at most six."""
    exponents = list(range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1))
    step = max(1, math.ceil(len(exponents) / 6))
    return [10.0**exponent for exponent in exponents[::step]]


@dataclass(frozen=True)
class Scale:
    """Maps data [low, high] to pixels [start, stop], linearly or by logarithm (then low > 0)."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = (math.log(one) if self.log else one for one in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round numbers along the axis."""
        return log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high, 6)


def span(values: Sequence[float], *, pad: float = 0.05, log: bool = False) -> tuple[float, float]:
    """Low and high of an axis that shows all values with a margin; never empty."""
    finite = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if log:
        factor = (high / low) ** pad if high > low else 2.0
        return low / factor, high * factor
    room = (high - low) * pad or abs(high) * 0.1 or 1.0
    return low - room, high + room


def label(x: float, y: float, text: str, kind: str = "", anchor: str = "start", turn: bool = False) -> str:
    """A text, if there is one; `kind` is its CSS class; `turn` reads upwards."""
    if not text:
        return ""
    turned = f' transform="rotate(-90 {coordinate(x)} {coordinate(y)})"' if turn else ""
    named = f' class="{kind}"' if kind else ""
    place = f'x="{coordinate(x)}" y="{coordinate(y)}"'
    return f'<text {place}{named} text-anchor="{anchor}"{turned}>{escape(text)}</text>'


def tip(text: str) -> str:
    """The attribute that the page shows when the pointer is over an element."""
    return f'data-tip="{escape(text)}"'


def mixed(share: float, low: str = "--low", zero: str = "--zero", high: str = "--high") -> str:
    """The fill of a heat map's cell: from −1 (`low`) over 0 (`zero`) to 1 (`high`)."""
    clipped = max(-1.0, min(1.0, share))
    end = high if clipped >= 0 else low
    return f"color-mix(in oklab,var({end}) {abs(clipped) * 100:.0f}%,var({zero}))"
