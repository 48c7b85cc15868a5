"""What a command shows: tables on standard output; progress and log lines on standard error."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vlmgraft.storage.progress import EVERY, LOG, Meter, Progress, duration

__all__ = ["LineProgress", "cell", "duration", "log_to_terminal", "percent", "progress_bar", "show_table", "size"]

WIDTH = 140
"""Width of tables that are written to a file or a pipe."""


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table with a title; all columns but the first are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)


def cell(value: Any) -> str:
    """A number with four significant digits, an estimate in percent with its interval, an empty text for None."""
    if value is None:
        return ""
    if isinstance(value, Mapping) and "mean" in value:
        return percent(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(estimate: Mapping[str, float] | None) -> str:
    """An estimate in percent, such as "72.7 [69.1, 76.2]"; an empty text for None."""
    if estimate is None:
        return ""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * estimate[key] for key in ("mean", "low", "high")))


def size(nbytes: float) -> str:
    """A number of bytes as a text such as "16.6 GB"; empty for 0."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes:.0f} B" if nbytes else ""


def log_to_terminal(verbose: int, quiet: bool) -> None:
    """Show the log of `vlmgraft` on standard error: warnings, with -v also information, with -vv everything."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    LOG.setLevel(level)
    if not any(isinstance(handler, _Handler) for handler in LOG.handlers):
        LOG.addHandler(_Handler())


class _Handler(logging.Handler):
    """Passes records to rich on a terminal, else writes plain lines; rich is imported at the first record."""

    def emit(self, record: logging.LogRecord) -> None:
        from rich.console import Console
        from rich.logging import RichHandler

        console = Console(stderr=True)
        if console.is_terminal:
            RichHandler(console=console, show_path=False).handle(record)
        else:
            print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress | None]:
    """Progress on standard error: a bar on a terminal, else a line every 30 s; under torchrun in the first process."""
    from vlmgraft.storage.torchrun import rank_and_world

    if quiet or rank_and_world()[0] > 0:
        yield None
    elif sys.stderr.isatty():
        with _bar() as progress:
            yield progress
    else:
        with LineProgress() as lines:
            yield lines


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class Rate(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "")

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(), Rate(),
        progress.TimeElapsedColumn(), progress.TimeRemainingColumn(),
    )  # fmt: skip
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label[-40:])


class LineProgress(Meter):
    """Progress as a line every `every` seconds, even if nothing new is reported."""

    def __init__(self, every: float = EVERY) -> None:
        super().__init__()
        self.every = every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True, name="progress")

    def __enter__(self) -> LineProgress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _write(self) -> None:
        while not self._over.wait(self.every):
            print(f"vlmgraft: {self.line()}", file=sys.stderr, flush=True)
