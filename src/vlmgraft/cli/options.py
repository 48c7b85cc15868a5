"""Options that several commands share, and the conversion of a dataclass to a command.

A command is a class that becomes a dataclass: its fields are its arguments and options, its docstring is its help, and
`run` does its work. Shared options are defined in base classes, so that every option is defined in one place.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer
from typer.models import ArgumentInfo

from vlmgraft.cli.output import duration, log_to_terminal, progress_bar
from vlmgraft.errors import InputError, OutputError
from vlmgraft.storage.progress import Progress
from vlmgraft.storage.torchrun import rank_and_world

OURS = {
    "receipt.json", "factors.json", "gates.json", "run.json", "comparison.json", "knockout.jsonl", "ranks.jsonl",
    "sweep.jsonl", "results.jsonl", "training.json", "front.jsonl",
}  # fmt: skip
"""A folder that holds one of these files was written by a command."""


@contextmanager
def replacing(out: Path) -> Iterator[None]:
    """Move `out` aside during the block; remove it afterwards, or put it back if the block raises.

    A folder that a killed run left aside is put back by the next run.

    Raises:
        OutputError: `out` is a link or a file, or a folder that holds nothing that vlmgraft writes.
    """
    aside = out.with_name(f".{out.name}.replaced")
    if aside.is_dir() and not out.exists():
        aside.rename(out)
    if not out.exists() and not out.is_symlink():
        yield
        return
    if out.is_symlink() or not out.is_dir() or not _ours(out):
        raise OutputError(f"{out}: --force replaces folders that vlmgraft wrote, and this is none; remove it yourself")
    shutil.rmtree(aside, ignore_errors=True)
    out.rename(aside)
    try:
        yield
    except BaseException:
        if not out.exists():
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _ours(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return not names or bool(names & OURS)


EXIT_CODES = (
    "Exit codes: 0 done; 1 the work failed; 2 recipe or inputs are wrong, nothing was started; 130 interrupted."
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)
lab_app = typer.Typer(no_args_is_help=True, help="The embedded trio: base, VLM and donor, small and offline.")
app.add_typer(lab_app, name="lab")

RecipeArgument = Annotated[Path, typer.Argument(help="recipe in YAML")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="override a recipe key: key=value, dotted")]


def _plain(value: Any) -> Any:
    """Convert values for JSON: dataclasses to mappings, paths and other objects to texts."""
    result = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if result else str(value)


@dataclasses.dataclass(kw_only=True)
class Command:
    """The base class of all commands; it and its subclasses are dataclasses. Results go to standard output, everything
    else to standard error."""

    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no notes")] = False
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="more on standard error; -vv: all")] = 0

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(kw_only=True)(cls)

    def __post_init__(self) -> None:
        self._began = time.monotonic()

    def elapsed(self) -> str:
        """The time since the command began, in words."""
        return duration(time.monotonic() - self._began)

    @abstractmethod
    def run(self) -> None:
        """Do the work and show its result."""

    def around(self) -> AbstractContextManager[object]:
        """A context around `run`; subclasses with options that concern the whole command override it."""
        return nullcontext()

    def progress(self) -> AbstractContextManager[Progress | None]:
        """Progress on standard error; None with --quiet."""
        return progress_bar(self.quiet)

    def note(self, text: str) -> None:
        """A line on standard error, unless --quiet."""
        if not self.quiet:
            typer.echo(text, err=True)

    def options_of(self, cls: Any) -> dict[str, Any]:
        """The options that are fields of a dataclass, by their names."""
        return {key: value for key, value in vars(self).items() if key in cls.__dataclass_fields__}

    def show(self, result: Any, show: Callable[[], object] | str) -> None:
        """Show the result: as one JSON object with --json, else as `show` prints it."""
        if self.as_json:
            typer.echo(json.dumps(result, ensure_ascii=False, default=_plain))
        elif isinstance(show, str):
            typer.echo(show)
        else:
            show()


class Distributed(Command):
    """Commands that also run under torchrun, where the first process alone shows results and notes."""

    def note(self, text: str) -> None:
        """As `Command.note`."""
        if rank_and_world()[0] == 0:
            super().note(text)

    def show(self, result: Any, show: Callable[[], object] | str) -> None:
        """As `Command.show`."""
        if rank_and_world()[0] == 0:
            super().show(result, show)


class Writes(Command):
    """Commands that write `--out`, which must not exist."""

    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write; must not exist")]
    force: Annotated[bool, typer.Option("--force", help="replace an --out that vlmgraft wrote")] = False

    def replaced(self) -> Path | None:
        """The output that this run may replace."""
        return self.out if self.force else None

    def around(self) -> AbstractContextManager[object]:
        """Move the old `--out` aside while the new one is written, and put it back if that fails."""
        outer, out = super().around(), self.replaced()
        return outer if out is None else nested(outer, replacing(out))


class Resumable(Writes):
    """Commands that can resume an interrupted run."""

    resume: Annotated[bool, typer.Option("--resume", help="go on with what an interruption left")] = False

    def around(self) -> AbstractContextManager[object]:
        """As `Writes`; raises RecipeError for two options that contradict each other."""
        if self.force and self.resume:
            from vlmgraft.errors import RecipeError

            raise RecipeError("--force and --resume: one begins anew, the other goes on; give one of them")
        return super().around()


class Fetches(Command):
    """Commands that may read from a hub."""

    token: Annotated[
        str | None, typer.Option("--token", envvar="HF_TOKEN", help="of the hub, for gated models", show_default=False)
    ] = None

    def around(self) -> AbstractContextManager[object]:
        """Set the token in the environment, where the hub's library looks for it."""
        return nested(super().around(), environment(HF_TOKEN=self.token))


class Computes(Fetches):
    """Commands that compute on weights."""

    threads: Annotated[int | None, typer.Option(help="CPU threads [default: as the libraries choose]", min=1)] = None

    def around(self) -> AbstractContextManager[object]:
        """Set OMP_NUM_THREADS and MKL_NUM_THREADS, which torch reads when it is imported."""
        count = str(self.threads) if self.threads else None
        return nested(super().around(), environment(OMP_NUM_THREADS=count, MKL_NUM_THREADS=count))


class LoadsModels(Computes):
    """Commands that load a model."""

    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or such as cuda:1 [default: the first GPU, or the CPU]")
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="of the loaded models; auto: bfloat16 on a GPU, float32 on the CPU"),
    ] = "auto"

    def around(self) -> AbstractContextManager[object]:
        """Set device and dtype in the environment, where `vlmgraft.hf.placement` looks for them."""
        dtype = None if self.dtype == "auto" else self.dtype
        return nested(super().around(), environment(VLMGRAFT_DEVICE=self.device, VLMGRAFT_DTYPE=dtype))


C = TypeVar("C", bound=type[Command])


def command(group: typer.Typer = app, name: str | None = None) -> Callable[[C], C]:
    """Register a class as a command, by default named as the class in lower case."""

    def register(cls: C) -> C:
        def call(**values: Any) -> None:
            chosen = cls(**values)
            log_to_terminal(chosen.verbose, chosen.quiet)
            bars = None if sys.stderr.isatty() and not chosen.quiet else "1"  # the libraries' own
            silent = environment(HF_HUB_DISABLE_PROGRESS_BARS=bars, HF_DATASETS_DISABLE_PROGRESS_BARS=bars)
            with silent, chosen.around():
                chosen.run()

        call.__doc__ = cls.__doc__
        call.__name__ = name or cls.__name__.lower()
        call.__signature__ = inspect.Signature(_parameters(cls))  # type: ignore[attr-defined]
        group.command(call.__name__, epilog=EXIT_CODES)(call)
        return cls

    return register


def _parameters(cls: type[Command]) -> list[inspect.Parameter]:
    """The fields as parameters of a function: arguments first, then the command's own options, then shared ones."""
    hints = get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    order = [key for base in cls.__mro__ for key in inspect.get_annotations(base) if key in fields]
    names = list(dict.fromkeys(order))
    arguments = [key for key in names if any(isinstance(note, ArgumentInfo) for note in hints[key].__metadata__)]
    return [
        inspect.Parameter(
            key,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if fields[key].default is dataclasses.MISSING else fields[key].default,
            annotation=hints[key],
        )
        for key in [*arguments, *(key for key in names if key not in arguments)]
    ]


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Set environment variables inside the block; those whose value is None are left unchanged."""
    changed: Mapping[str, str] = {key: value for key, value in values.items() if value is not None}
    before = {key: os.environ.get(key) for key in changed}
    try:
        _set(changed)
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _set(variables: Mapping[str, str]) -> None:
    """Set environment variables; raises InputError for values that they cannot hold: a NUL, a lone surrogate."""
    for key, value in variables.items():
        try:
            os.environ[key] = value
        except ValueError as error:
            raise InputError(f"{value!r:.80}: is no value of an option ({error}); write it without") from error


@contextmanager
def nested(outer: AbstractContextManager[object], inner: AbstractContextManager[object]) -> Iterator[None]:
    """One context around another."""
    with outer, inner:
        yield
