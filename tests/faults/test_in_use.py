"""Every command refuses a folder that another process is working in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import Job

from tests.lock_holder import held_elsewhere

PLACES = {
    "merge": "out", "frism": ".out.work/factors", "decompose": "out", "gates": "out", "evaluate": "out",
    "sweep": "out", "tune": "out", "export": "out", "choose": "out", "front": "out", "knockout": "out", "ranks": "out",
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_every_command_refuses_a_folder_that_is_in_use(
    name: str, small_jobs: dict[str, Callable[[Path], Job]], tmp_path: Path, vlmgraft: Callable[..., Any]
) -> None:
    with held_elsewhere(tmp_path / PLACES[name]) as process:
        ran = vlmgraft(*small_jobs[name](tmp_path).arguments)
        assert ran.code == 2, ran.err
        assert f"process {process.pid}" in ran.err and "name another folder" in ran.err
    assert [path.name for path in tmp_path.iterdir() if path.name not in (".out.work",)] == []


@pytest.mark.parametrize("name", ["gates", "export"])
def test_factors_that_are_being_written_are_not_read(
    name: str, small_jobs: dict[str, Callable[[Path], Job]], tmp_path: Path, vlmgraft: Callable[..., Any]
) -> None:
    job = small_jobs[name](tmp_path)
    factors = Path(job.arguments[job.arguments.index("--factors") + 1])
    with held_elsewhere(factors):
        ran = vlmgraft(*job.arguments)
    assert ran.code == 2 and str(factors) in ran.err and "at work" in ran.err
