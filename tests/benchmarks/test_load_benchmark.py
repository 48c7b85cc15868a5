"""The load benchmark runs, and its small figures say what they should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "load.py"


@pytest.mark.slow
def test_quick_writes_its_results(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--only", "experts", "shards", "--out", str(tmp_path / "r.json")]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["experts", "experts fused", "shards"]
    assert rows[0]["donor tensors"] == rows[1]["donor tensors"] == 394
    assert rows[0]["tensors written"] == 395 and rows[1]["tensors written"] < 20
    assert rows[2]["faults"] == 0 and rows[2]["open"] < 200
