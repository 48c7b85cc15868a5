"""The report of the lab's experiments: its arithmetic on rows made by hand, and the committed rows."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "lab"
ENERGY, DONOR = "FRISM (KL budget)", "FRISM (donor matching)"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[str, dict[str, Any]]]:
    """Write the report of a folder of rows, and read it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("lab_report")

    def make(folder: Path) -> tuple[str, dict[str, Any]]:
        module.write_report(folder)
        return (folder / "variants.md").read_text(), json.loads((folder / "variants.json").read_text())

    return make


def row(method: str, setting: dict[str, Any], solved: int, kl: float, **notes: Any) -> dict[str, Any]:
    """Of a hundred sums the first `solved` are right; everything is seen."""
    right = {"sum": "1" * solved + "0" * (100 - solved), "read": "1" * 10, "colour": "1" * 10}
    right |= {"glyph": "1" * 10, "list_colours": "1" * 10}
    divergences = {"kl": kl, "control_kl": 0.003, "fresh_kl": 0.0032}
    return {"method": method, "setting": setting, "right": right, **divergences, "notes": notes, "seconds": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three seeds; task arithmetic rises from 20 to 60 over KLs of 0 to 0.004."""
    at = {"budget": 0.003}
    for seed, gain in enumerate((0, 5, 10)):
        sizes = {"sums": 100, "perception": 10, "steps": 5, "control": 40, "held_out": 40}
        head = {"about": {"trio": seed, "sizes": sizes}, "torch": "2", "date": "2026-01-01"}
        rows = [
            row("VLM", {}, 20, 0.0),
            row("task arithmetic", {"scale": 0.5}, 60, 0.004),
            row(ENERGY, at, 60, 0.002, inject_weight=0.1),
            row(DONOR, at, 65 + gain, 0.002, inject_weight=3.0),
        ]
        text = "".join(json.dumps(each) + "\n" for each in (head, *rows))
        (tmp_path / f"variants-{seed}.jsonl").write_text(text)
    return tmp_path


def test_differences_are_paired_by_item_and_averaged_over_seeds(folder: Path, report: Any) -> None:
    text, data = report(folder)
    table = {each["row"]: each for each in data["Every method at 0.003 nats per token"]}
    assert table[ENERGY]["above"]["items"]["mean"] == pytest.approx(0.20)
    assert table[DONOR]["above"]["items"]["mean"] == pytest.approx(0.30)
    pair = next(each for each in data["pairs at 0.003"] if (each["first"], each["second"]) == (DONOR, ENERGY))
    seeds = pair["difference"]["seeds"]
    assert pair["difference"]["items"]["mean"] == pytest.approx(0.10)
    assert seeds["high"] - 0.10 == pytest.approx(4.303 * 0.05 / 3**0.5, rel=1e-6), "Student's t, two degrees of freedom"
    assert 0.05 < pair["difference"]["items"]["low"] < 0.10 < pair["difference"]["items"]["high"] < 0.15
    assert "60.0 / 100.0 / 0.0020 (+20.0 [" in text


def test_where_budgets_end(folder: Path, report: Any) -> None:
    text, data = report(folder)
    assert data["control"]["1"]["control_kl"] == pytest.approx([1, 1])
    assert data["control"]["1"]["kl"] == pytest.approx([2 / 3, 2 / 3])
    assert "| 0 | 2 | 1.000 | 1.000 to 1.000 | 2 | 1.067 | 1.067 to 1.067 | 2 | 0.667 | 0.667 to 0.667 | 0 |" in text


def test_a_row_that_a_seed_lacks_has_no_mean(folder: Path, report: Any) -> None:
    path = folder / "variants-2.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if DONOR not in line))
    _, data = report(folder)
    table = {each["row"]: each for each in data["Every method at 0.003 nats per token"]}
    assert table[DONOR]["above"] is None and set(table[DONOR]["seeds"]) == {"0", "1"}


def test_the_committed_report_is_that_of_the_committed_rows(tmp_path: Path, report: Any) -> None:
    files = sorted(RESULTS.glob("variants-*.jsonl"))
    assert len(files) == 3
    for file in files:
        shutil.copy(file, tmp_path)
    text, _ = report(tmp_path)
    assert text == (RESULTS / "variants.md").read_text()
    made, kept = (  # the last digits of quantiles are those of scipy's release
        json.loads((folder / "variants.json").read_text(), parse_float=lambda digits: round(float(digits), 9))
        for folder in (tmp_path, RESULTS)
    )
    assert made == kept
