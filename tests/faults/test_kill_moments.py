"""Every command that writes is killed at seeded moments; see kills.py. `python benchmarks/kill.py` kills 200 times and more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import Job
from kills import Victim, Warm


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as process:
        yield process


@pytest.mark.parametrize("name", ["merge", "decompose", "evaluate"])
def test_killed(
    name: str, small_jobs: dict[str, Callable[[Path], Job]], warm: Warm, trio: Path, tmp_path: Path
) -> None:
    victim = Victim(name, small_jobs[name], (trio,), tmp_path, warm)
    victim.chain(0, 2, True)
    print(victim.tally, victim.seconds)
