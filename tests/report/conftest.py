"""A folder with every kind of run, and the page made of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from report_runs import write_runs

from vlmgraft.report.page import write_report


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def page(runs: Path) -> Path:
    return write_report([runs], runs.parent / "report.html")
