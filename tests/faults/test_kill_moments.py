"""Every command that writes is killed at seeded moments; see kills.py. `python benchmarks/kill.py` kills 200 times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from jobs import Job
from kills import Victim, Warm

Jobs = dict[str, Callable[[Path], Job]]


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as process:
        yield process


@pytest.fixture(scope="module")
def warm_with_trainer() -> Iterator[Warm]:
    with Warm("tune") as process:
        yield process


def check(name: str, jobs: Jobs, warm: Warm, trio: Path, folder: Path, chains: Sequence[bool], kills: int = 2) -> None:
    """Chains of kills with and without --resume; see `Victim` for what is asserted."""
    victim = Victim(name, jobs[name], (trio,), folder, warm)
    for seed, resume in enumerate(chains):
        victim.chain(seed, kills, resume)
    assert victim.tally.completed == len(chains) and victim.kills > 0, "some were killed before they were done"


def test_merge_and_decompose(small_jobs: Jobs, warm: Warm, trio: Path, tmp_path: Path) -> None:
    check("merge", small_jobs, warm, trio, tmp_path / "merge", (True, False))
    check("decompose", small_jobs, warm, trio, tmp_path / "decompose", (True,))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ties", "frism", "decompose", "gates", "evaluate"])
def test_the_others(name: str, small_jobs: Jobs, warm: Warm, trio: Path, tmp_path: Path) -> None:
    check(name, small_jobs, warm, trio, tmp_path, (True, False))


@pytest.mark.slow
def test_fine_tuning(small_jobs: Jobs, warm_with_trainer: Warm, trio: Path, tmp_path: Path) -> None:
    check("tune", small_jobs, warm_with_trainer, trio, tmp_path, (True, False))
