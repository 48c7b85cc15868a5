"""The rounding benchmark runs, and its matrices are what it says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "rounding.py"
sys.path.insert(0, str(SCRIPT.parent))


@pytest.mark.slow
def test_quick_prints_a_row_per_matrix_and_merge() -> None:
    ran = subprocess.run([sys.executable, str(SCRIPT), "--quick"], check=True, capture_output=True, timeout=600)
    rows = [json.loads(line) for line in ran.stdout.decode().splitlines() if line.startswith("{")]
    by_part = {part: [row for row in rows if row["part"] == part] for part in ("matrix", "lab")}
    assert len(by_part["matrix"]) == 4 * 5 * 2 and len(by_part["lab"]) == 2 * 3
    assert all(row["effective"] > 0.99 for row in by_part["lab"] if row["writing"] == "float32")


def test_made_matrices_have_the_size_and_the_spectrum_that_were_asked_for() -> None:
    from rounding import FIRST, made

    weight, tau, rank_one = made((48, 32), 0.02, torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(tau.double())
    assert math.isclose(float(tau.norm() / weight.float().norm()), 0.02, rel_tol=1e-4)
    assert math.isclose(float(values[0] ** 2 / values.square().sum()), FIRST, rel_tol=1e-3)
    assert math.isclose(float(rank_one.norm()), float(tau.norm()), rel_tol=1e-4)
    assert int(torch.linalg.matrix_rank(rank_one.double(), rtol=1e-5)) == 1
