"""`vlmgraft report`: one self-contained HTML page from run folders. No network, no torch, no drawing library.

The pictures are SVG made here, and a hundred lines of script add hover and filters. Plotly was measured: its script
alone is 4.8 MB, above what a whole page may weigh; pictures of SVG also print, and are there without script.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmgraft import __version__
from vlmgraft.errors import InputError, OutputError, VlmgraftError
from vlmgraft.folders import make_folder
from vlmgraft.records import write_text
from vlmgraft.report import parts
from vlmgraft.report.collect import ODD, Collected, collect
from vlmgraft.report.sections import Section, render_section
from vlmgraft.report.svg import escape

MAX_BYTES = 3_000_000
HERE = Path(__file__).parent


def write_report(
    folders: Sequence[str | Path], out: str | Path, title: str = "What was grafted, and what carries it"
) -> Path:
    """Write the page `out` from everything that is in the run folders, and give its path.

    Raises:
        InputError: a folder is missing or holds nothing of a run. OutputError: the page would weigh 3 MB or more.
    """
    text = render(collect(folders), title, [str(folder) for folder in folders])
    size = len(text.encode())
    if size >= MAX_BYTES:
        raise OutputError(f"{out}: the page would weigh {size:,} bytes; give fewer folders at a time")
    path = Path(out)
    make_folder(path.parent)
    write_text(path, text)
    return path


def render(found: Collected, title: str, folders: Sequence[str]) -> str:
    """The page as text; a section appears where there are rows for it."""
    try:
        sections: list[Section] = [section for make in parts.ALL for section in make(found)]
        drawn, figures = "\n".join(map(render_section, sections)), parts.summary(found)
    except VlmgraftError:
        raise
    except ODD as error:
        raise InputError(
            f"{', '.join(folders)}: a file holds rows that no command wrote ({type(error).__name__}: {error!s:.200}); "
            "make them again, or leave their folder out"
        ) from error
    links = "".join(f'<a href="#{section.id}">{escape(section.topic)}</a>' for section in sections)
    css, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>\n{css}</style></head>\n<body><header><h1>{escape(title)}</h1>{figures}"
        f'<nav>{links}<button id="theme" type="button">light / dark</button></nav></header>\n<main>'
        + f"{drawn}</main>\n<footer>Made by vlmgraft {__version__} from {escape(', '.join(folders))}. "
        "Bars and brackets are 95 % bootstrap intervals over questions.</footer>"
        f'<div id="tip" role="status" hidden></div><script>\n{script}</script></body></html>\n'
    )
