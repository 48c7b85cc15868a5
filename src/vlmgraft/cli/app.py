"""What the commands share: the application, its common options, progress, and the entry point."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vlmgraft.errors import VlmgraftError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
lab_app = typer.Typer(no_args_is_help=True, help="The embedded trio: base, VLM and donor, small and offline.")
app.add_typer(lab_app, name="lab")

RecipeArgument = Annotated[Path, typer.Argument(help="recipe in YAML")]
Out = Annotated[Path, typer.Option("--out", help="folder to write; must not exist")]
Set = Annotated[list[str] | None, typer.Option("--set", help="override a recipe key: key=value, dotted")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable output")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from vlmgraft import __version__

        typer.echo(f"vlmgraft {__version__}")
        raise typer.Exit


@app.callback()
def vlmgraft(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Give a vision-language model the reasoning of a text model of its family, by merging weights."""


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar on standard error, one line per kind of work; under torchrun, of the first process."""
    if quiet or os.environ.get("RANK", "0") != "0":
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what[-40:])


def main() -> None:
    """Entry point: errors and interruptions become one line on standard error and an exit code."""
    from vlmgraft.cli.interrupts import INTERRUPTED, Interrupted, how_to_go_on, interruptible

    with interruptible():
        try:
            app()
        except VlmgraftError as error:
            _fail(error)
        except (OSError, MemoryError, RuntimeError) as error:
            _fail(_plain(error))
        except Interrupted:
            typer.echo(f"vlmgraft: interrupted; {how_to_go_on(sys.argv[1:])}", err=True)
            sys.exit(INTERRUPTED)
        except SystemExit as stop:
            if stop.code == INTERRUPTED:  # Typer's answer to a KeyboardInterrupt of a library
                typer.echo(f"vlmgraft: interrupted; {how_to_go_on(sys.argv[1:])}", err=True)
            raise


def _fail(error: VlmgraftError) -> None:
    typer.echo(f"vlmgraft: {error}", err=True)
    sys.exit(error.exit_code)


def _plain(error: OSError | MemoryError | RuntimeError) -> VlmgraftError:
    """Our error for what the system refused; raises `error` again where nothing better can be said."""
    from vlmgraft.errors import InputError
    from vlmgraft.resources import ONLY_WRITING, REMEDIES, cannot_write, is_memory

    if is_memory(error):
        return VlmgraftError(f"out of memory ({str(error)[:200] or 'the system has no more'}); use a smaller setting")
    if isinstance(error, OSError) and error.errno in ONLY_WRITING:
        return cannot_write(error.filename2 or error.filename or "a file", error)
    if isinstance(error, OSError) and error.filename and error.errno in REMEDIES:
        return InputError(f"{error.filename}: {error.strerror}; {REMEDIES[error.errno]}")
    raise error
