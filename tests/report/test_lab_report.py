"""One command on the lab: a page with every section, from rows that another run finds again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.lab import compare, tour
from vlmgraft.records import read_rows

SECTIONS = ("tradeoff", "answers", "safety", "spectra", "directions", "gates", "layers", "receipt", "recipe")


@pytest.mark.slow
def test_lab_report(vlmgraft: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("STEPS", 3), ("CALIBRATION", 32), ("DONOR_QUESTIONS", 8), ("BATCH_SIZE", 16)):
        monkeypatch.setattr(compare, name, value)
    grids = ("task arithmetic:method.scale=0.5,1", "FRISM, donor matching:method.inject_weight=3")
    monkeypatch.setattr(tour, "GRIDS", grids)
    out = tmp_path / "report"
    ran = vlmgraft("lab", "report", "--out", out, "--samples", "8")
    assert ran.code == 0, ran.err
    page = (out / "report.html").read_text()
    assert all(f'<section id="{name}"' in page for name in SECTIONS) and len(page) < 3_000_000
    rows = {name: list(read_rows(out / name / f"{name}.jsonl")) for name in ("sweep", "knockout", "ranks")}
    assert [len(rows[name]) for name in rows] == [1 + 2 + 4, 98, 31]
    learned = next(row for row in rows["sweep"] if row["method"] == "FRISM, donor matching")
    merged = next(row for row in rows["knockout"] if row["model"] == "merged" and row["mode"] == "intact")
    assert learned["right"] == merged["right"], "the sweep's point is the merged folder's"
    assert vlmgraft("lab", "report", "--out", out).code == 2
    assert vlmgraft("lab", "report", "--out", out, "--samples", "8", "--resume").code == 0
    assert (out / "report.html").read_text() == page
