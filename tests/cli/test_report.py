"""The command `report`: a page, and figures for papers."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report.report_runs import ROWS, write_runs
from vlmgraft.storage.jsonl import write_rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


def test_the_command_writes_the_page(vlmgraft: Callable[..., Any], runs: Path, tmp_path: Path) -> None:
    ran = vlmgraft("report", runs / "sweep", "--out", tmp_path / "page" / "r.html", "--title", "Mine & yours")
    assert ran.code == 0 and "<h1>Mine &amp; yours</h1>" in (tmp_path / "page" / "r.html").read_text()
    assert vlmgraft("report", tmp_path / "none").code == 2


def test_figures_for_papers(vlmgraft: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_rows(tmp_path / "run" / "sweep.jsonl", [{**row, "kl": row["order"] / 100} for row in ROWS])
    ran = vlmgraft("report", tmp_path / "run", "--out", tmp_path / "r.html", "--figures", tmp_path / "figures")
    assert ran.code == 0, ran.err
    names = {"tradeoff-1-perception-against-reasoning", "tradeoff-2-reasoning-bought-per-drift"}
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert written == {f"{name}.{suffix}" for name in names for suffix in ("svg", "pdf")}
    text = (tmp_path / "figures" / "tradeoff-1-perception-against-reasoning.svg").read_text()
    assert ElementTree.parse(io.StringIO(text)).getroot().tag.endswith("svg") and "aria-label" not in text
    assert all(f">{label}</text>" in text for label in ("VLM", "FRISM", "task arithmetic", "λ 1.5"))
    page = (tmp_path / "r.html").read_text()
    assert page.count(">λ 1.5</text>") == 2, "settings are written on the points of both charts"
    assert "0.01</b>nats per token, KL of FRISM λ 1 from the VLM" not in page, (
        "FRISM sees two points worse than the VLM"
    )
