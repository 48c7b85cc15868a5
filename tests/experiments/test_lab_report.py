"""One command on the lab: a page with every section, from rows that another run finds again."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from experiments.lab import report
from experiments.lab.__main__ import main
from vlmgraft.lab.compare import Sizes
from vlmgraft.storage.jsonl import read_rows

SECTIONS = ("tradeoff", "answers", "distances", "spectra", "directions", "gates", "layers", "receipt", "recipe")


@pytest.mark.slow
def test_lab_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Sizes(calibration=32, donor=8, steps=3)
    grids = ("task arithmetic:method.scale=0.5,1", "FRISM, donor matching:method.inject_weight=3")
    monkeypatch.setattr(report, "write_lab_report", partial(report.write_lab_report, sizes=few, grids=grids))
    out = tmp_path / "report"
    command = ["report", "--out", str(out), "--samples", "8"]
    assert main(command) == 0
    page = (out / "report.html").read_text()
    assert all(f'<section id="{name}"' in page for name in SECTIONS) and len(page) < 3_000_000
    rows = {name: list(read_rows(out / name / f"{name}.jsonl")) for name in ("sweep", "knockout", "ranks")}
    assert [len(rows[name]) for name in rows] == [1 + 2 + 4, 98, 31]
    learned = next(row for row in rows["sweep"] if row["method"] == "FRISM, donor matching")
    merged = next(row for row in rows["knockout"] if row["model"] == "merged" and row["mode"] == "intact")
    assert learned["right"] == merged["right"], "the sweep's point is the merged folder's"
    assert main(["report", "--out", str(out)]) == 2
    assert main([*command, "--resume"]) == 0
    assert (out / "report.html").read_text() == page
