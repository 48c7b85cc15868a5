"""The best point, the Pareto front, and one style for a method in all pictures."""

from __future__ import annotations

from pathlib import Path

from report_runs import POINTS, ROWS, point

from vlmgraft.report.collect import Run
from vlmgraft.report.parts.tradeoff import best, finding, method_styles, tradeoff, tradeoff_chart, vlm_row


def test_the_best_point_keeps_its_sight() -> None:
    top = best(POINTS)
    assert top is not None and top["method"] == "FRISM <b>"
    assert finding(POINTS[:1]) == "No point reasons better than the VLM and still sees as well"
    assert "every point" in finding([point("ties", 1, 0.5, 0.5, 0.1)])


def test_a_method_has_one_style_whatever_stands_beside_it() -> None:
    assert method_styles(ROWS) == {"VLM": 0, "task arithmetic": 1, "FRISM": 2}
    assert method_styles(ROWS[3:] + ROWS[:3])["VLM"] == 0


def test_the_front_is_what_no_point_beats() -> None:
    """FRISM at half a point less sight than the VLM and 28 points more reasoning; task arithmetic at 1 reasons best."""
    section = tradeoff(Run(Path("a/run"), POINTS), method_styles(POINTS))
    (table,) = section.tables
    assert [row[-1] for row in table.rows] == [True, False, True, True]
    rings = {(series.name, dot.y) for series in tradeoff_chart(POINTS).series for dot in series.dots if dot.ring}
    assert rings == {("VLM", 50.0), ("task arithmetic", 80.0), ("FRISM <b>", 78.0)}
    assert table.name == "points of run" and section.title.endswith("78 % against the VLM's 50 %")


def test_drift_is_drawn_where_it_was_measured_and_not_for_the_vlm() -> None:
    """The VLM's own is zero, which no logarithmic axis has."""
    drift = tradeoff(Run(Path("run"), POINTS), method_styles(POINTS)).figures[1].chart
    assert [series.name for series in drift.series] == ["task arithmetic", "FRISM <b>"]
    assert [(dot.x, dot.y) for dot in drift.series[0].dots] == [(0.01, 70.0), (0.1, 80.0)]
    unmeasured = [{key: value for key, value in row.items() if key != "kl"} for row in POINTS]
    assert len(tradeoff(Run(Path("run"), unmeasured), method_styles(POINTS)).figures) == 1


def test_points_that_are_not_to_be_drawn_are_left_out() -> None:
    hidden = [*POINTS, point("secret", 1, 0.99, 0.99, 0.001) | {"drawn": False}]
    section = tradeoff(Run(Path("run"), hidden), method_styles(hidden))
    assert len(section.tables[0].rows) == len(POINTS) and "FRISM" in section.title


def test_without_a_vlm_there_is_no_best_point() -> None:
    assert vlm_row(POINTS) == POINTS[0] and vlm_row(POINTS[1:]) is None
    assert best(POINTS[1:]) is None and finding(POINTS[1:]) == "Reasoning and perception of every point"
