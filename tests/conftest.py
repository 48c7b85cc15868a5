"""The embedded trio and a runner for the command line; shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from vlmgraft import cli
from vlmgraft.lab import trio_path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: the models are tiny, threads only wait
settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def trio() -> Path:
    """Folder of the embedded base, vlm and donor."""
    return trio_path()


@pytest.fixture
def vlmgraft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs the command line in this process, through its entry point."""

    def run(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["vlmgraft", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return run
