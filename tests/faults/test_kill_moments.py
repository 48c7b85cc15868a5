"""Every command that writes is killed at seeded moments; see kills.py. `python benchmarks/kill.py` kills 200 times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import Job
from kills import Victim, Warm

Jobs = dict[str, Callable[[Path], Job]]


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm("tune") as process:
        yield process


@pytest.mark.parametrize("name", ["merge", "ties", "frism", "decompose", "gates", "tune", "evaluate"])
def test_killed(name: str, small_jobs: Jobs, warm: Warm, trio: Path, tmp_path: Path) -> None:
    victim = Victim(name, small_jobs[name], (trio,), tmp_path, warm)
    victim.chain(0, 2, True)
    victim.chain(1, 2, False)
    print(victim.tally, victim.seconds)
