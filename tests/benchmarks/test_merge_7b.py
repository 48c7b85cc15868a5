"""The merge at the size of 7B runs, small, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "merge_7b.py"


@pytest.mark.slow
def test_quick_writes_its_results(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--folder", str(tmp_path), "--out", str(tmp_path / "r")]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    found = json.loads((tmp_path / "r.json").read_text())
    assert [row["case"] for row in found["rows"]] == ["cp", "task_arithmetic", "task_arithmetic, torch", "linear"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.md"]
