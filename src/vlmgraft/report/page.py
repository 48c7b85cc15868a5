"""`vlmgraft report`: one self-contained HTML page from run folders. No network, no torch.

The pictures are SVG by matplotlib, and a hundred lines of script add hover and filters. Plotly was measured: its script
alone is 4.8 MB, above what a whole page may weigh; pictures of SVG also print, and are there without script.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vlmgraft._version import __version__
from vlmgraft.errors import InputError, OutputError, VlmgraftError
from vlmgraft.report import parts
from vlmgraft.report.charts import save_chart
from vlmgraft.report.collect import ODD, Collected, collect
from vlmgraft.report.sections import render_section
from vlmgraft.report.text import escape
from vlmgraft.storage.files import make_folder
from vlmgraft.storage.jsonl import write_text
from vlmgraft.storage.outputs import refuse_file, refuse_place
from vlmgraft.storage.portable import nameless

MAX_BYTES = 3_000_000
MARK = b'<meta name="generator" content="vlmgraft'
"""By which a page of ours is known, and may be replaced."""
FIGURE_MARKS = (b"<dc:title>Matplotlib v", b"%PDF-1.4\n%\xac\xdc \xab\xba")
"""How figures by matplotlib begin."""
HERE = Path(__file__).parent


def write_report(
    folders: Sequence[str | Path], out: str | Path, title: str = "What was grafted, and what carries it"
) -> Path:
    """Write the page `out` from everything that is in the run folders, and give its path.

    Raises:
        InputError: a folder is missing or holds nothing of a run. OutputError: the page would weigh 3 MB or more, or
            `out` is a file that is no such page.
    """
    refuse_file(Path(out), lambda head: MARK in head)
    text = render(collect(folders), title, [str(folder) for folder in folders])
    size = len(text.encode())
    if size >= MAX_BYTES:
        raise OutputError(f"{out}: the page would weigh {size:,} bytes; give fewer folders at a time")
    path = Path(out)
    make_folder(path.parent)
    write_text(path, text)
    return path


def write_figures(folders: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Every figure of the page as SVG and PDF for papers, into the folder `out`.

    Raises:
        InputError: as `write_report`, or the runs hold nothing to draw. OutputError: a file of that name that was not
            drawn by matplotlib.
    """
    refuse_place(out)
    names = [str(folder) for folder in folders]
    runs, written = collect(folders), []
    with _rows_of_ours(names):
        for section in parts.sections(runs):
            for index, figure in enumerate(section.figures):
                make_folder(Path(out))
                for suffix in ("svg", "pdf"):
                    written.append(Path(out) / f"{section.file_name(index)}.{suffix}")
                    refuse_file(written[-1], lambda head: any(mark in head for mark in FIGURE_MARKS))
                    save_chart(figure.chart, written[-1])
    if not written:
        raise InputError(f"{', '.join(names)}: nothing to draw; run `vlmgraft sweep` or `vlmgraft knockout` first")
    return written


@contextmanager
def _rows_of_ours(folders: Sequence[str]) -> Iterator[None]:
    """What comes of rows that no command wrote, as an error of the input."""
    try:
        yield
    except VlmgraftError:
        raise
    except ODD as error:
        raise InputError(
            f"{', '.join(folders)}: a file holds rows that no command wrote ({type(error).__name__}: {error!s:.200}); "
            "make them again, or leave their folder out"
        ) from error


def render(runs: Collected, title: str, folders: Sequence[str]) -> str:
    """The page as text; a section appears where there are rows for it."""
    with _rows_of_ours(folders):
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
