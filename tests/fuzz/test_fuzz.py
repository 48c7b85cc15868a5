"""The kept corpus goes through every target; where atheris is there, a short pass of the fuzzer with a fixed seed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from targets import TARGETS

HERE = Path(__file__).parent


KEPT = [case for case in sorted(HERE.glob("corpus/*/*")) if case.is_file()]
RUNS = {"header": 4000, "index": 1500, "recipe": 150, "answers": 40} | dict.fromkeys(
    ("config", "receipt", "factors", "gates", "pictures"), 1000
)


def test_the_corpus_is_small_and_complete() -> None:
    assert {case.parent.name for case in KEPT} == set(TARGETS)
    assert sum(case.stat().st_size for case in KEPT) < 300_000


@pytest.mark.parametrize("case", KEPT, ids=[f"{case.parent.name}-{case.name}" for case in KEPT])
def test_kept_cases(case: Path) -> None:
    TARGETS[case.parent.name](case.read_bytes())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_a_short_pass(target: str, tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "run.py"), target, f"-runs={RUNS[target]}", "-seed=1", "-rss_limit_mb=3000"]
    ran = subprocess.run(
        [*command, "-timeout=600", "-report_slow_units=600", f"-artifact_prefix={tmp_path}/"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0 and not list(tmp_path.iterdir()), ran.stderr[-3000:]
