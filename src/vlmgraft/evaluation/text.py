"""Cleaning short texts before they are compared: Unicode variants, Markdown, LaTeX wrappers, case. Pure, no torch."""

from __future__ import annotations

import re
import unicodedata

_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_RAISED_RUN = re.compile(r"(?<=[\w)\]}°'′])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_NARROW_THOUSANDS = re.compile(r"(?<=\d)(?:[\u00a0\u2009\u202f]|,?\\[,!]|\{,\}|\\ )(?=\d{3}(?!\d))")
_DASHES = re.compile(r"[\u2010-\u2015\u2212\ufe63\uff0d]")
_FONT = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|bold|bm|rm|bf|mbox|operatorname)\s*\{([^{}]*)\}"
)
_SPACING = re.compile(r"\\(?:[,;:!> ]|quad\b|qquad\b|left\b|right\b|displaystyle\b|limits\b)|(?<!\\)~")
_DEGREES = re.compile(r"\^?\s*\{?\s*\\(?:circ|degree)(?![a-z])\s*\}?")
_DOLLARS = re.compile(r"\$\$?(.+?)\$\$?", re.DOTALL)
_DOLLAR_AMOUNT = re.compile(r"\$\s*\d[\d,.]*$")
_MARKDOWN = re.compile(r"(\*\*|__|`+)(?=\S)(.+?)(?<=\S)\1")
_EMPHASIS = re.compile(r"(?<![\w*])\*(?=[^\s*])([^*]+?)(?<=[^\s*])\*(?![\w*])")
EDGES = " \t\n\r.,;:!?\"'’‘“”´`*_#>|"
LONGEST = 20_000
"""Characters looked at, at the end of a text: nobody's answer is longer, and every pattern stays fast."""


def plain(text: str) -> str:
    """Unicode variants to one form: widths, dashes, spaces, raised digits to ^n, ½ to 1/2; invisible marks removed.

    >>> plain("１½ m² − 3")
    '1 1/2 m^2 - 3'
    """
    text = _NARROW_THOUSANDS.sub("", text[-LONGEST:])
    text = _RAISED_RUN.sub(lambda run: "^" + run.group().translate(_RAISED), text)
    pieces = []
    for char in text:
        category = unicodedata.category(char)
        if category in ("Cf", "Cs") or (category == "Cc" and char not in "\n\t"):
            continue
        if category == "Nd" and not char.isascii():
            char = str(unicodedata.decimal(char))
        elif unicodedata.decomposition(char).startswith("<fraction>"):
            char = f" {unicodedata.normalize('NFKC', char)} "
        pieces.append(char)
    text = unicodedata.normalize("NFKC", "".join(pieces)).replace("\u2044", "/")
    return " ".join(_DASHES.sub("-", text).split(" ")).replace("\u00a0", " ")


def unwrap(text: str) -> str:
    """Without what only sets type: Markdown emphasis, $ … $, \\( … \\), \\text{…}, spacing; degrees become °."""
    text = plain(text).strip()
    text = re.sub(r"\\[()\[\]]", " ", text) if "\\" in text else text
    for _ in range(3):
        text = _FONT.sub(r" \1 ", text)
    text = _SPACING.sub(" ", _DEGREES.sub("°", text))
    text = text.replace("\\%", "%").replace("\\$", "US$").replace("\\cdot", "*").replace("\\times", "*")
    if not _DOLLAR_AMOUNT.fullmatch(text):
        text = _DOLLARS.sub(r"\1", text)
    text = _EMPHASIS.sub(r"\1", _MARKDOWN.sub(r"\2", text))
    text = re.sub(r"\\(?:d|t|c)frac", r"\\frac", text)
    return " ".join(text.split())


def key(text: str) -> str:
    """The form in which two texts are the same text: unwrapped, lower case, without punctuation at the edges."""
    text = unwrap(text).casefold()
    for _ in range(2):
        text = text.strip(EDGES + "$")
        if len(text) > 1 and (text[0], text[-1]) in (("(", ")"), ("[", "]"), ("{", "}")) and _closes_at_end(text):
            text = text[1:-1]
    return text.replace("’", "'").strip()


def _closes_at_end(text: str) -> bool:
    depth = 0
    for at, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return at == len(text) - 1
    return False


def storable(text: str) -> str:
    """The text with halves of surrogate pairs, which no file can hold, replaced by "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")
