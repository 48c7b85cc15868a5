"""An output that cannot be made is refused before a model is loaded, by every command that writes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import Job

from vlmgraft.hf import models

NEW = ("front", "sweep", "knockout", "ranks", "choose", "steer")
OLD = ("merge", "frism", "tune", "decompose", "gates", "evaluate", "export")
NAMES = [*NEW, *(pytest.param(name, marks=pytest.mark.slow) for name in OLD)]


def a_file(job: Job) -> None:
    job.out.write_text("mine")


def somebodys_folder(job: Job) -> None:
    job.out.mkdir()
    (job.out / "mine.txt").write_text("mine")


def below_a_file(job: Job) -> None:
    job.out.parent.rmdir()
    job.out.parent.write_text("mine")


@pytest.mark.parametrize("taken", [a_file, somebodys_folder, below_a_file], ids=lambda taken: taken.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_the_place_is_tried_first(
    name: str, taken: Any, small_jobs: dict[str, Callable[[Path], Job]], vlmgraft: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "in").mkdir()
    job = small_jobs[name](tmp_path / "in")
    taken(job)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(models, "_load", lambda *_: pytest.fail("a model was loaded"))
    ran = vlmgraft(*job.arguments)
    assert ran.code == 2 and str(job.out.parent) in ran.err, ran.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
