"""Text for readers: escaping, numbers with few digits, sentences."""

from __future__ import annotations

import html
import math


def escape(text: object) -> str:
    """Escape text for HTML and SVG, including attributes."""
    return html.escape(str(text), quote=True)


def attributes(data: dict[str, str]) -> str:
    """The `data-` attributes that the page's filters match."""
    return "".join(f' data-{key}="{escape(value)}"' for key, value in data.items())


def sentence(text: str) -> str:
    """The text as a sentence: capitalised, with a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def number(value: float | None, digits: int = 3) -> str:
    """A readable number: `digits` significant digits, no trailing zeros, no exponent between 1e-4 and 1e6."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    places = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    text = f"{value:,.{min(places, 6)}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
