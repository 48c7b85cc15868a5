"""The benchmarks of gates and of the SVD run, and write the table with the command that made it."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        ("gates.py", ["--layer", "tiny", "--tokens", "16", "--repeats", "1", "--ranks", "64", "8"], 2),
        ("gates.py", ["--shape", "16", "8", "--tokens", "4", "--repeats", "1", "--ranks", "8"], 1),
        ("svd.py", ["--model", "tiny", "--ranks", "8"], 11),
    ],
)
def test_a_table_is_written(
    script: str, arguments: list[str], rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "table.txt"
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--out", str(out)])
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    command, machine, header, *lines = out.read_text().splitlines()
    assert command.startswith(f"python benchmarks/{script} {arguments[0]}") and "torch" in machine and header
    assert len(lines) == rows


def test_a_command_on_a_busy_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio is that of the times; the process that kept a core busy is gone."""
    out = tmp_path / "busy.json"
    monkeypatch.setattr(sys, "argv", ["busy.py", "--quick", "--out", str(out)])
    runpy.run_path(str(BENCHMARKS / "busy.py"), run_name="__main__")
    found = json.loads(out.read_text())
    assert found["ratio"] == found["busy"] / found["idle"]
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_the_card_benchmark_checks_itself_and_runs_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its quick form: the device's results are the CPU twin's, every stage leaves rows, ratios are of those rows."""
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--out", str(out)])
    runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")
    written = json.loads(out.read_text())
    rows = {row["what"]: row for row in written["rows"]}
    assert written["left_out"] == [] and len(rows) == len(written["rows"]) == 22
    assert all(row["seconds"] > 0 for row in rows.values())
    read, answer = (rows[f"{verb} 3 prompts of 12 tokens"] for verb in ("read", "answer"))
    assert answer["ratio"] == pytest.approx(answer["seconds"] / read["seconds"])
    assert rows["encode 3 images of 8 tokens"]["counted"] == 1 and written["tower"]["depth"] == 2
    step, plain = rows["gate step, factored, rank 8"], rows["plain forward and backward"]
    assert step["ratio"] == pytest.approx(step["seconds"] / plain["seconds"])
    narrow = sum(
        rows[f"decompose ({shape}, 64), rank 8"]["seconds"] * count for shape, count in ((64, 2), (32, 2), (128, 3))
    )
    assert rows["decompose the whole model, rank, by counting"]["seconds"] == pytest.approx(2 * narrow)
    gpu = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    with pytest.raises(SystemExit, match="off the CPU's result"):
        gpu["_close"]("a value", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 1e-3)


def test_a_row_whose_time_is_over_is_named_and_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row in hand is counted once; sums over rows that are not there are named as well."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")
    bench, calls = gpu.Bench(torch.device("cpu"), "quick", 60.0), []
    bench.sizes = {**bench.sizes, "repeats": 3}

    def decompose(tau: torch.Tensor, rank: object) -> None:
        calls.append((tuple(tau.shape), rank))
        if len(calls) == 4 + 2:
            bench.end = 0.0

    monkeypatch.setattr(gpu, "decompose_matrix", decompose)
    gpu.decompositions(bench)
    assert calls == [((64, 64), "full")] * 4 + [((64, 64), 8)] * 2
    assert [(row["what"], row["counted"]) for row in bench.rows] == [
        ("torch.linalg.svd (64, 64)", 3),
        ("decompose (64, 64), rank full", 3),
        ("decompose (64, 64), rank 8", 1),
    ]
    wide = [f"decompose ({shape}, 64), rank {rank}" for shape in (32, 128) for rank in ("full", 8)]
    counted = [f"decompose the whole model, {key}, by counting" for key in ("full", "rank")]
    assert bench.left_out == ["torch.linalg.svd (32, 64)", *wide, *counted]
    bench.left_out.clear()
    gpu.run(bench)
    assert bench.left_out == list(gpu.STAGES) and len(bench.rows) == 3
    bench.left_out.clear()
    gpu.tuning(bench)
    assert bench.left_out == ["DRIFT step, attention", "DRIFT step, attention+mlp"]
