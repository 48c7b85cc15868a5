"""`vlmgraft report`: one self-contained HTML page from run folders. No network, no torch.

Charts are SVG by matplotlib, and a hundred lines of script add hover and filters. Plotly was measured: its script
alone is 4.8 MB, more than the size limit of a whole page; SVG charts also print, and are shown without scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmgraft._version import __version__
from vlmgraft.errors import InputError, OutputError
from vlmgraft.report import parts
from vlmgraft.report.charts import save_chart
from vlmgraft.report.collect import Collected, collect
from vlmgraft.report.sections import render_section
from vlmgraft.report.text import escape
from vlmgraft.storage.files import make_folder
from vlmgraft.storage.jsonl import write_text
from vlmgraft.storage.listed import listed
from vlmgraft.storage.outputs import refuse_file, refuse_place
from vlmgraft.storage.portable import nameless

MAX_BYTES = 3_000_000
MARK = b'<meta name="generator" content="vlmgraft'
"""Identifies a page that vlmgraft wrote, which may be overwritten."""
FIGURE_MARKS = (b"<dc:title>Matplotlib v", b"%PDF-1.4\n%\xac\xdc \xab\xba")
"""First bytes of figures that matplotlib wrote."""
HERE = Path(__file__).parent


def write_report(
    folders: Sequence[str | Path], out: str | Path, title: str = "What was grafted, and what carries it"
) -> Path:
    """Write the page `out` from all data in the run folders, and return its path.

    Raises:
        InputError: a folder is missing or holds no data of a run. OutputError: the page would have 3 MB or more, or
            `out` exists and is not such a page.
    """
    refuse_file(Path(out), lambda head: MARK in head)
    text = render(collect(folders), title, [str(folder) for folder in listed(folders)])
    size = len(text.encode())
    if size >= MAX_BYTES:
        raise OutputError(f"{out}: the page would weigh {size:,} bytes; give fewer folders at a time")
    path = Path(out)
    make_folder(path.parent)
    write_text(path, text)
    return path


def write_figures(folders: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Write every figure of the page as SVG and PDF for papers into the folder `out`.

    Raises:
        InputError: as `write_report`, or the runs hold nothing to draw. OutputError: a file of that name exists and
            was not drawn by matplotlib.
    """
    refuse_place(out)
    runs, written = collect(folders), []
    for section in parts.sections(runs):
        for index, figure in enumerate(section.figures):
            make_folder(Path(out))
            for suffix in ("svg", "pdf"):
                written.append(Path(out) / f"{section.file_name(index)}.{suffix}")
                refuse_file(written[-1], lambda head: any(mark in head for mark in FIGURE_MARKS))
                save_chart(figure.chart, written[-1])
    if not written:
        names = ", ".join(map(str, listed(folders)))
        raise InputError(f"{names}: nothing to draw; run `vlmgraft sweep` or `vlmgraft knockout` first")
    return written


def render(runs: Collected, title: str, folders: Sequence[str]) -> str:
    """The page as HTML text; a section appears if there are rows for it."""
    sections = parts.sections(runs)
    drawn, figures = "\n".join(map(render_section, sections)), parts.summary(runs)
    links = "".join(f'<a href="#{section.id}">{escape(section.topic)}</a>' for section in sections)
    css, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK.decode()} {__version__}">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>\n{css}</style></head>\n<body><header><h1>{escape(title)}</h1>{figures}"
        f'<nav>{links}<button id="theme" type="button">light / dark</button></nav></header>\n<main>'
        + f"{drawn}</main>\n<footer>Made by vlmgraft {__version__} from {escape(nameless(', '.join(folders)))}. "
        "Bars and brackets are 95 % intervals over questions.</footer>"
        f'<div id="tip" role="status" hidden></div><script>\n{script}</script></body></html>\n'
    )
