"""The planning benchmark runs, on checkpoints that are what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan.py"


def test_quick_writes_its_results(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path / "r")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["about"]["tensors"][0] == found["about"]["tensors"][1] + 1 > 1200
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert len(found["seconds"]) == (tmp_path / "r.md").read_text().count("\n| ") - 1
