"""The trade-off picture is written and can be opened."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmgraft.report.tradeoff import draw_tradeoff


def row(method: str, order: float, reasoning: float, perception: float) -> dict[str, Any]:
    axes = {"reasoning": reasoning, "perception": perception}
    spread = {axis: {"mean": mean, "low": mean - 0.03, "high": mean + 0.02} for axis, mean in axes.items()}
    return {"method": method, "setting": f"λ {order:g}", "order": order, **spread}


ROWS = [row("task arithmetic", order, 0.3 + order / 5, 0.98 - order / 10) for order in (1.0, 0.5, 1.5)]
ROWS += [row("VLM", 0, 0.25, 0.99), row("FRISM", 1, 0.7, 0.97)]


def test_png_opens_and_shows_something(tmp_path: Path) -> None:
    draw_tradeoff(ROWS, tmp_path / "tradeoff.png", "a finding")
    with Image.open(tmp_path / "tradeoff.png") as image:
        assert image.format == "PNG" and min(image.size) > 500
        colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    drawn = {tuple(colour) for colour in colours.tolist()}
    assert {(0, 114, 178), (230, 159, 0)} <= drawn, "second and third method in their colours"


def test_svg_names_methods_and_axes(tmp_path: Path) -> None:
    draw_tradeoff(ROWS, tmp_path / "tradeoff.svg", "a finding")
    text = (tmp_path / "tradeoff.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert all(f"<!-- {said} -->" in text for said in ("VLM", "FRISM", "task arithmetic", "a finding"))
