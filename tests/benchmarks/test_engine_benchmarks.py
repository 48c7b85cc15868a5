"""The benchmarks of gates and of the SVD run, and write the table with the command that made it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

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
