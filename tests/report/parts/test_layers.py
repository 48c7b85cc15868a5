"""Knock-outs and bands: where the loss is, which layers lose, which band carries the most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_runs import estimate

from vlmgraft.report.collect import Run
from vlmgraft.report.parts.layers import bands, centre, knockout


def test_the_centre_is_where_the_loss_is() -> None:
    cells = [
        {"model": "m", "mode": "zero", "part": "both", "layer": layer, "reasoning_change": estimate(-loss)}
        for layer, loss in enumerate((0.0, 0.1, 0.3))
    ]
    assert centre(cells, "m", "zero", "reasoning") == pytest.approx((0.1 + 0.6) / 0.4)
    assert centre(cells[:1], "m", "zero", "reasoning") is None


def cell(mode: str, layer: int, reasoning: float, perception: float) -> dict[str, Any]:
    changes = {"reasoning_change": estimate(reasoning), "perception_change": estimate(perception)}
    same = {"reasoning": estimate(0.5), "perception": estimate(0.9)}
    return {"model": "merged", "mode": mode, "part": "both", "layer": layer, "against": "merged", **same, **changes}


def test_a_knockout_says_where_reasoning_and_sight_are_lost() -> None:
    """Sight is lost in layer 0, reasoning in layers 2 and 3; a loss of two points may be chance."""
    losses = [(0.0, -0.5), (-0.02, 0.0), (-0.3, 0.0), (-0.3, 0.0)]
    rows = [cell("zero", layer, *loss) for layer, loss in enumerate(losses)]
    section = knockout(Run(Path("run"), [*rows, cell("only", 2, 0.05, 0.0)]))
    assert "reasoning sits later than perception: centre of loss at layer 2.5 against 0" in section.title
    said = " ".join(section.text)
    assert "reasoning beyond chance in layers 2, 3 and perception in layers 0;" in said
    assert "Merged alone, layer 2 (both) brings the most: +5.0 points of reasoning [2.0, 8.0]." in said
    maps = {(figure.data["mode"], figure.data["kind"]): figure.chart.values for figure in section.figures}
    assert maps["zero", "perception"] == [[-50.0, 0.0, 0.0, 0.0]] and maps["only", "reasoning"] == [[5.0]]


def test_the_gentlest_knockout_is_shown_first() -> None:
    rows = [cell(mode, 0, -0.1, -0.1) for mode in ("constant", "zero", "mean", "restore")]
    choice = knockout(Run(Path("run"), rows)).filters[0]
    assert list(choice.values) == ["constant", "zero", "mean", "restore"] and choice.off == ("constant", "zero")


def test_the_band_with_the_highest_peak_is_named() -> None:
    """Each band at two scales: band 2 peaks at 70 % where it is injected twice."""
    rows = [
        {"by": "rank", "of": 2, "band": band, "scale": scale, "energy": 0.5, "injected": 0.7}
        | {"reasoning": estimate(mean), "perception": estimate(0.9), "kl": 0.1}
        for band, scale, mean in ((None, 0.0, 0.5), (0, 1.0, 0.6), (0, 2.0, 0.4), (1, 1.0, 0.5), (1, 2.0, 0.7))
    ]
    section = bands(Run(Path("run"), rows))
    assert section.title == "Band 2 of 2 carries the most reasoning by itself: 70 % at λ 2"
    assert "band 1 of 2 at λ 1 (60.0 %); band 2 of 2 at λ 2 (70.0 %)" in section.text[0]
    assert "equal numbers of directions" in section.text[0]
    first = section.figures[0].chart.series[0]
    assert [(dot.x, dot.y) for dot in first.dots] == [(0.0, 50.0), (1.0, 60.0), (2.0, 40.0)]
