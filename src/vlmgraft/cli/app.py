"""The entry point: every error and interruption becomes one line on standard error and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vlmgraft.cli.options import app
from vlmgraft.errors import InputError, VlmgraftError

USAGE: type[Exception] = typer.BadParameter.__mro__[2]
"""The base class of errors about arguments, which Typer does not export."""


def _show_version(wanted: bool) -> None:
    """Print the version and those of the libraries that results depend on, without importing the libraries."""
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    from vlmgraft._version import __version__

    typer.echo(f"vlmgraft {__version__}")
    typer.echo(f"python {python_version()}")
    for name in ("torch", "transformers"):
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} is not installed")
    raise typer.Exit


@app.callback()
def vlmgraft(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="versions of vlmgraft, torch and transformers"
        ),
    ] = False,
) -> None:
    """Give a vision-language model the reasoning of a text model of its family, by merging weights."""


OURS = (
    "vlmgraft: this is a mistake of vlmgraft, not of what it was given. Please report it, with the command and all of "
    "what follows; CONTRIBUTING.md says where."
)


def main() -> None:
    """Run the command line; exit code 0 done, 1 failed, 2 wrong inputs, 130 interrupted."""
    from vlmgraft.cli.interrupts import INTERRUPTED, Interrupted, how_to_go_on, interruptible
    from vlmgraft.storage.torchrun import leave_group

    with interruptible():
        try:
            code = app(standalone_mode=False)
            leave_group()
        except VlmgraftError as error:
            _fail(error)
        except USAGE as error:
            _fail(_wrong_usage(error))
        except (OSError, MemoryError, RuntimeError) as error:
            _fail(_plain(error))
        except Interrupted:
            code = INTERRUPTED
        except Exception:
            typer.echo(OURS, err=True)
            raise
        if code == INTERRUPTED:  # also Typer's exit code after a library's KeyboardInterrupt
            typer.echo(f"vlmgraft: interrupted; {how_to_go_on(sys.argv[1:])}", err=True)
        sys.exit(code or 0)


def _fail(error: VlmgraftError) -> None:
    typer.echo(f"vlmgraft: {error}", err=True)
    sys.exit(error.exit_code)


def _wrong_usage(error: Exception) -> InputError:
    """The error for a wrong command line, which names the `--help` that lists commands and options."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "vlmgraft"
    message: str = error.format_message()  # type: ignore[attr-defined]
    if "Usage:" in message:  # no arguments at all: the message is the help
        typer.echo(message, err=True)
        sys.exit(InputError.exit_code)
    return InputError(f"{message.rstrip('.')}; `{command} --help` lists what there is")


def _plain(error: OSError | MemoryError | RuntimeError) -> VlmgraftError:
    """Convert an error of the operating system to a VlmgraftError; raises `error` again if no remedy is known."""
    from vlmgraft.storage.resources import ONLY_WRITING, REMEDIES, cannot_write, is_memory

    if is_memory(error):
        return VlmgraftError(f"out of memory ({str(error)[:200] or 'the system has no more'}); use a smaller setting")
    if isinstance(error, OSError) and error.errno in ONLY_WRITING:
        if not (error.filename2 or error.filename):  # errors of files that we write name the file
            return VlmgraftError(f"standard output: cannot be written ({error.strerror}); send it where there is room")
        return cannot_write(error.filename2 or error.filename, error)
    if isinstance(error, OSError) and error.filename and error.errno in REMEDIES:
        return InputError(f"{error.filename}: {error.strerror}; {REMEDIES[error.errno]}")
    typer.echo(OURS, err=True)
    raise error
