"""The merge benchmark runs, and its cases compute the same thing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "merge.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("merge_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_it_is_compared_with_computes_the_same(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.make(tmp_path, 0.001, benchmark.KEYS[:3])
    benchmark.ours(tmp_path, tmp_path / "ours", "task_arithmetic", 2)
    benchmark.whole_tensors(tmp_path, tmp_path / "theirs")
    benchmark.copy(tmp_path, tmp_path / "copy")
    ours, theirs, vlm = (load_file(tmp_path / one / "model.safetensors") for one in ("ours", "theirs", "copy"))
    assert set(ours) == set(theirs) == set(vlm)
    assert any(not torch.equal(ours[name], vlm[name]) for name in vlm)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=2**-7, atol=0)  # one rounding apart at most


@pytest.mark.slow
def test_quick_writes_its_results(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--folder", str(tmp_path), "--out", str(tmp_path / "r")]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    found = json.loads((tmp_path / "r.json").read_text())
    cases = [row["case"] for row in found["rows"]]
    assert cases[:3] == ["cp", "cp+fsync", "task_arithmetic"] and "whole tensors" in cases
    assert all(row["seconds"] > 0 for row in found["rows"]) and found["about"]["cores"]
    assert (tmp_path / "r.md").read_text().count("\n| ") == len(cases) + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.md"]
