"""The entry point: exit codes, and one line on standard error for whatever is wrong."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from broken_inputs import FAULTS

from tests.recipe_place import Place
from vlmgraft import pipeline
from vlmgraft.cli.app import OURS
from vlmgraft.errors import NumericalError, RecipeError


@pytest.mark.parametrize("arguments", [["merge", "--nonsense"], ["nonsense"], ["lab", "nonsense"]])
def test_unknown_commands_and_options_are_input_errors(arguments: list[str], vlmgraft: Any) -> None:
    assert vlmgraft(*arguments).code == 2


def test_an_interruption_is_130_and_names_the_way_on(
    trio: Path, tmp_path: Path, vlmgraft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    place = Place(tmp_path, trio, "task_arithmetic")
    monkeypatch.setattr(pipeline, "merge", interrupted)
    ran = vlmgraft("merge", place.write(), "--out", place.out)
    assert ran.code == 130
    assert "--resume" in ran.err and "Traceback" not in ran.err


@pytest.mark.parametrize("fault", ["truncated shard", "unknown recipe key"])
def test_exit_code_of_the_process(fault: str, trio: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    said = FAULTS[fault](place)
    entry = [sys.executable, "-c", "from vlmgraft.cli import main; main()"]
    command = [*entry, "merge", str(place.write()), "--out", str(place.out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert all(part in ran.stderr for part in said)
    assert not list(place.out.parent.iterdir())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["merge", "--nonsense"], ["--nonsense", "vlmgraft merge --help"]),
        (["nonsense"], ["nonsense", "vlmgraft --help"]),
        (["attention", "m", "--samples", "many"], ["--samples", "integer", "vlmgraft attention --help"]),
        (["evaluate", "m", "-o", "o", "--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        (["export", "m"], ["--to", "lora", "hub", "vlmgraft export --help"]),
    ],
)
def test_a_wrong_command_line_is_one_line_with_its_remedy(
    arguments: list[str], parts: list[str], vlmgraft: Any
) -> None:
    ran = vlmgraft(*arguments)
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith("vlmgraft: ") and ran.err.count("\n") == 1
    assert [part for part in parts if part not in ran.err] == []


def test_without_a_command_the_help_is_on_standard_error(vlmgraft: Any) -> None:
    ran = vlmgraft()
    assert ran.code == 2 and ran.out == "" and "Usage: " in ran.err and "merge" in ran.err


def test_a_library_that_is_missing_is_said(vlmgraft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return "9.9"

    monkeypatch.setattr(metadata, "version", version)
    assert vlmgraft("--version").out.splitlines()[2:] == ["torch is not installed", "transformers 9.9"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (NumericalError("w: overflow"), 1, "w: overflow"),
        (RecipeError("scale: no\nnumber"), 2, "scale: no number"),
        (MemoryError(), 1, "out of memory (the system has no more); use a smaller setting"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "out of memory (CUDA out of memory. Tried); use a smaller"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "standard output: cannot be written (No space left"),
        (OSError(errno.ENOSPC, "No space", "a/file"), 2, "a/file: cannot be written (No space); make room"),
        (OSError(errno.ENOSPC, "No space", "from", None, "a/to"), 2, "a/to: cannot be written"),
        (OSError(errno.EACCES, "Permission denied", "a/file"), 2, "a/file: Permission denied; change its permissions"),
    ],
)
def test_every_error_is_one_line_and_its_exit_code(
    error: Exception, code: int, said: str, vlmgraft: Any, stand_in: Callable[..., Any]
) -> None:
    stand_in("vlmgraft.pipeline", "read_recipe", error)
    ran = vlmgraft("merge", "r.yaml", "-o", "out")
    assert (ran.code, ran.out) == (code, "") and ran.err.startswith(f"vlmgraft: {said}") and ran.err.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), RuntimeError("mat1 and mat2"), OSError(errno.EBADF, "bad")])
def test_a_mistake_of_ours_is_a_traceback_that_asks_to_be_reported(
    error: Exception, vlmgraft: Any, stand_in: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in("vlmgraft.pipeline", "read_recipe", error)
    with pytest.raises(type(error)):
        vlmgraft("merge", "r.yaml", "-o", "out")
    assert capsys.readouterr().err.startswith(OURS)
