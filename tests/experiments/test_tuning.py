"""The lab's study of fine-tuning: its rows, its choices, and its table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.lab.tuning import ARMS, Arm, Study
from vlmgraft.lab.compare import Sizes
from vlmgraft.lab.world import PERCEPTION
from vlmgraft.storage.jsonl import read_rows, write_rows

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lab_drift.py"
SMALL = Sizes(8, 2, 8, 2, calibration=8, held_out=8, donor=4, steps=2)


def marks(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean, "high": mean}


def row(method: str, split: str, reasoning: float, perception: float, **setting: float) -> dict[str, Any]:
    right = {"sum": [1] * int(10 * reasoning) + [0] * (10 - int(10 * reasoning))}
    right |= {task: [1] * int(10 * perception) + [0] * (10 - int(10 * perception)) for task in PERCEPTION}
    known = {"split": split, "method": method, "setting": setting, "reasoning": marks(reasoning), "kl": 0.01}
    return {**known, "perception": marks(perception), "right": right}


def test_the_table_has_marks_and_paired_differences(tmp_path: Path) -> None:
    for seed, gain in ((0, 0.1), (1, 0.2)):
        rows = [row("VLM", "test", 0.3, 0.9), row("SFT", "test", 0.5, 0.8, learning_rate=1e-4, strength=0.0)]
        rows += [row("DRIFT adaptive, attention", "test", 0.5 + gain, 0.7, learning_rate=1e-4, strength=0.3)]
        rows += [row("SFT", "validation", 0.1, 0.1, learning_rate=1e-4, strength=0.0)]
        write_rows(tmp_path / f"drift-{seed}.jsonl", rows)
    files = sorted(tmp_path.glob("drift-*.jsonl"))
    shown = subprocess.run([sys.executable, SCRIPT, "--summarise", *files], capture_output=True, text=True, check=True)
    lines = shown.stdout.splitlines()
    assert "| DRIFT adaptive, attention | 60.0 / 70.0 / 0.0100 | 70.0 / 70.0 / 0.0100 |" in lines[4]
    difference = next(line for line in lines[6:] if line.startswith("| DRIFT"))
    assert "| +15.0 [" in difference and "| -10.0 [" in difference


def test_the_committed_rows_give_the_table() -> None:
    files = sorted((SCRIPT.parent / "results" / "lab").glob("drift-*.jsonl"))
    assert len(files) == 3
    shown = subprocess.run([sys.executable, SCRIPT, "--summarise", *files], capture_output=True, text=True, check=True)
    rows = [line for line in shown.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 * (len(ARMS) + 3) - 1  # VLM and FRISM beside the arms, two headers, no SFT above itself


def test_choices_keep_perception_on_validation(trio: Path, tmp_path: Path) -> None:
    """The best reasoning within a point of the VLM's perception; and settings are carried over to another trio."""
    rates = {5e-5: (0.4, 0.9), 1e-4: (0.5, 0.9), 2e-4: (0.6, 0.8), 4e-4: (0.9, 0.5)}
    rows = [row("VLM", "validation", 0.3, 0.9)]
    rows += [row("SFT", "validation", *pair, learning_rate=rate, strength=0.0) for rate, pair in rates.items()]
    rows += [row("SFT", "test", 0.5, 0.9, learning_rate=1e-4, strength=0.0)]
    write_rows(tmp_path / "rows.jsonl", rows)
    study = Study(trio, tmp_path / "rows.jsonl", report=lambda text: None)
    assert study.choose(ARMS[0]) == {"learning_rate": 1e-4, "strength": 0.0}
    write_rows(tmp_path / "first.jsonl", [row(ARMS[1].name, "test", 0.5, 0.9, learning_rate=3e-4, strength=0.3)])
    other = Study(trio, tmp_path / "rows.jsonl", carried=tmp_path / "first.jsonl")
    assert other.choose(ARMS[1]) == {"learning_rate": 1e-4, "strength": 0.3}


@pytest.mark.slow
def test_a_small_study_goes_on_where_it_stopped(trio: Path, tmp_path: Path) -> None:
    arms = (ARMS[0], Arm("filtered", "adaptive", ("attention",), "base", filtered=True, strength=1.0), ARMS[9])
    first = Study(trio, tmp_path / "rows.jsonl", traces_count=4, steps=3, arms=arms[:1], sizes=SMALL)
    first.run()
    before = list(read_rows(tmp_path / "rows.jsonl"))
    rows = Study(trio, tmp_path / "rows.jsonl", traces_count=4, steps=3, arms=arms, sizes=SMALL).run()
    assert [entry["method"] for entry in rows] == ["VLM", "FRISM", *(arm.name for arm in arms)]
    after = list(read_rows(tmp_path / "rows.jsonl"))
    assert after[: len(before)] == before and len({json.dumps(entry) for entry in after}) == len(after)
    assert all(entry["kl"] > 0 for entry in rows[1:]) and rows[0]["kl"] < 1e-6
