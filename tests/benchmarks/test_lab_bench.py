"""The lab benchmark's summary, from the committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_summary_of_the_committed_seeds():
    results = sorted((ROOT / "benchmarks" / "results" / "lab").glob("seed-*.jsonl"))
    assert len(results) == 3
    command = [sys.executable, ROOT / "benchmarks" / "lab.py", "--summarise", *results]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(table) == 8
    assert all(line.count("|") == 5 for line in table)
    assert "FRISM, donor matching" in shown
