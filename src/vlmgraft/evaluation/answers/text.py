"""Cleaning short texts before they are compared: Unicode variants, Markdown, LaTeX wrappers, case. Pure, no torch.

Every pattern here runs in linear time: runs of white space are squeezed first, repetitions are bounded, and a pattern
that ends in a closing mark cannot run past the next opening one.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

LONGEST = 10_000
"""Number of characters that are read, from the end of a text; no answer is longer."""
EDGES = " \t\n\r.,;:!?\"'’‘“”´`*_#>|。，、；：！？"
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_RAISED_RUN = re.compile(r"(?<=[\w)\]}°'′])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]{1,20}")
_NARROW_THOUSANDS = re.compile(r"(?<=\d)(?:[\u00a0\u2009\u202f]|,?\\[,!]|\{,\}|\\ )(?=\d{3}(?!\d))")
_DASHES = re.compile(r"[\u2010-\u2015\u2212\ufe63\uff0d]")
_FONT = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|mathbb|bold|bm|rm|bf|mbox|operatorname) ?\{([^{}]*)\}"
)
_SPACING = re.compile(
    r"\\(?:[,;:!> ]|(?:quad|qquad|left|right|displaystyle|limits|dots|ldots|cdots)(?![a-z]))|(?<!\\)~"
)
_ENDLESS = re.compile(
    r"(?<![\d.,/])(\d{1,40})\.(\d{0,40}?)(?:(?:(\d)\3{2,40}|(\d{2,6}?)\4{1,20})(?:\.{2,3}|\\[lc]?dots(?![a-z]))"
    r"|\\overline ?\{ ?(\d{1,20}) ?\})"
)
_DEGREES = re.compile(r"\^?\{? ?\\(?:circ|degree)(?![a-z]) ?\}?|\^\{?°\}?|掳")
_DOLLARS = re.compile(r"\$\$?([^$]+)\$\$?")
_DOLLAR_AMOUNT = re.compile(r"\$\s?\d[\d,.]*$")
_MARKS = re.compile(r"\*\*|__|`+|\[/?INST\]|<\|[\w/ ]{1,40}\|>|</?s>")
_EMPHASIS = re.compile(r"(?<![\w*])\*(?=[^\s*])([^*]+)(?<=[^\s*])\*(?![\w*])")
_MATRIX = re.compile(
    r"\\begin\{[a-z]{0,9}(?:matrix|array)\}(?:\{[clr|]{0,9}\})?((?:(?!\\begin).){0,1000}?)\\end\{[a-z]{0,9}(?:matrix|array)\}",
    re.DOTALL,
)
_ODD = re.compile(r"[^\x20-\x7f\n\t]")
_SYMBOLS = str.maketrans({"≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∞": "\\infty ", "∪": "\\cup ", "±": "\\pm "})


def plain(text: str) -> str:
    """Normalise Unicode variants: widths, dashes, spaces, superscripts to ^n, ½ to 1/2; drop invisible characters.

    >>> plain("１½ m² − 3")
    '1 1/2 m^2 - 3'
    """
    text = text[-LONGEST:]
    if text.isascii() and text.isprintable() and "\\" not in text and "{" not in text:
        return text
    text = _NARROW_THOUSANDS.sub("", text)
    text = _RAISED_RUN.sub(lambda run: "^" + run.group().translate(_RAISED), text)
    text = _ODD.sub(_common, text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    return " ".join(_DASHES.sub("-", text).split(" ")).replace("\u00a0", " ")


def _common(odd: re.Match[str]) -> str:
    """The form that `plain` gives to a non-ASCII character."""
    char = odd.group()
    category = unicodedata.category(char)
    if category in ("Cf", "Cs", "Cc"):
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if unicodedata.decomposition(char).startswith("<fraction>"):
        return f" {unicodedata.normalize('NFKC', char)} "
    return char


def squeeze(text: str) -> str:
    """Strip all lines, collapse runs of spaces and tabs, and drop empty lines."""
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def unwrap(text: str) -> str:
    """Remove typesetting: Markdown emphasis, $ … $, \\( … \\), \\text{…}, spacing; degrees become °."""
    text = _ENDLESS.sub(_fraction, " ".join(plain(text).split()))
    if "\\" in text:
        text = _MATRIX.sub(_rows, text)
        text = re.sub(r"\\[()\[\]]", " ", text)
        for _ in range(3):
            text = _FONT.sub(r" \1 ", text)
        text = _SPACING.sub(" ", text).replace("\\%", "%").replace("\\$", "US$")
        text = text.replace("\\cdot", "*").replace("\\times", "*").replace("\\*", "*")
        text = re.sub(r"\\(?:d|t|c)frac", r"\\frac", text)
    text = _DEGREES.sub("°", " ".join(text.split()))
    if not _DOLLAR_AMOUNT.fullmatch(text):
        text = _DOLLARS.sub(r"\1", text)
    text = _EMPHASIS.sub(r"\1", _MARKS.sub("", text))
    return " ".join(text.translate(_SYMBOLS).split())


def _fraction(decimal: re.Match[str]) -> str:
    """A repeating decimal as a fraction: 6.666... is 20/3."""
    whole, once, *blocks = decimal.groups()
    block = next(filter(None, blocks))
    value = Fraction(f"{whole}.{once or 0}") + Fraction(int(block), 10 ** len(once) * (10 ** len(block) - 1))
    return str(value)


def _rows(matrix: re.Match[str]) -> str:
    """A matrix as a list of rows: [[a, b], [c, d]]."""
    rows = [row.replace("&", ", ").strip() for row in re.split(r"\\\\(?:\[[^\]]{0,9}\])?", matrix[1]) if row.strip()]
    return "[" + ", ".join(f"[{row}]" for row in rows) + "]"


def key(text: str) -> str:
    """The normal form in which texts are compared: unwrapped, lower case, without punctuation at the edges."""
    text = unwrap(text).casefold()
    for _ in range(2):
        text = text.strip(EDGES + "$")
        if len(text) > 1 and (text[0], text[-1]) in (("(", ")"), ("[", "]"), ("{", "}")) and closes_at_end(text):
            text = text[1:-1]
    return text.replace("’", "'").strip()


def closes_at_end(text: str) -> bool:
    """Whether the bracket that opens the text closes only at its end."""
    depth = 0
    for at, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return at == len(text) - 1
    return False


def split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts between separators that stand outside all brackets."""
    parts, depth, start, at = [], 0, 0, 0
    for match in separator.finditer(text):
        for char in text[at : match.start()]:
            depth += (char in "([{") - (char in ")]}")
        at = match.start()
        if depth <= 0:
            parts.append(text[start : match.start()])
            start = at = match.end()
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def storable(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot encode, replaced by "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")
