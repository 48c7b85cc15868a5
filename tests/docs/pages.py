"""The fenced blocks of a Markdown page, each with what is to be done with it.

A comment right above a block says how it is treated:

- `<!-- not run: REASON -->` it is not; the reason is required.
- `<!-- run with: OPTIONS -->` its `vlmgraft` commands get these options as well, to be short;
  `<!-- run with: ONE -> OTHER -->` in Python one text takes the place of the other.
- `<!-- with: NAME -->` `NAME` is put into the folder first (see `stage.py`).
- `<!-- about: REASON -->` above output: numbers may be a little different.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = ("bash", "python", "yaml", "jsonl", "output")
SHOWN = ("text", "mermaid")
_FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[^\s`]*)[^\n]*\n(?P<text>.*?)^(?P=indent)(?P=ticks)\s*$", re.M | re.S
)
_MARK = re.compile(r"<!-- (not run|run with|with|about): *(.*?) *-->")


@dataclass(frozen=True)
class Block:
    """One fenced block. line: of its fence, from 1. marks: the comments above it, by kind."""

    page: str
    line: int
    language: str
    text: str
    marks: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page}, line {self.line} ({self.language or 'no language'})"

    @property
    def told(self) -> bool:
        """Whether the page says why it is not run."""
        return bool(self.marks.get("not run"))


def pages() -> list[Path]:
    """Every page that has blocks: README, CONTRIBUTING, docs."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if blocks(page)]


def name(page: Path) -> str:
    """The page from the repository's root."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in _FENCE.finditer(text):
        above = re.findall(r"(?:<!--[^\n]*?-->\s*)+\Z", text[: match.start()])
        marks = dict(_MARK.findall(above[0])) if above else {}
        body = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M)
        found.append(Block(name(page), text.count("\n", 0, match.start()) + 1, match["language"], body, marks))
    return found
