"""Axes and numbers: round ticks inside the axis, values in their places, nothing lost on the way to text."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmgraft.report.charts import Axes, Dot, Heat, Series, bar_chart, heat_map, line_chart
from vlmgraft.report.sections import Table, as_csv
from vlmgraft.report.svg import Scale, log_ticks, mixed, nice_ticks, number, sentence, span

NUMBERS = st.floats(-1e6, 1e6)


@given(NUMBERS, st.floats(1e-3, 1e6))
def test_ticks_are_round_and_inside(low: float, width: float) -> None:
    ticks = nice_ticks(low, low + width)
    assert 1 <= len(ticks) <= 11
    assert all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in ticks)
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        lead = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(lead - nice) for nice in (1, 2, 5)) < 1e-3


@given(st.floats(1e-6, 1e3), st.floats(2, 1e6))
def test_log_ticks_are_powers_of_ten_inside(low: float, factor: float) -> None:
    for tick in log_ticks(low, low * factor):
        assert low * (1 - 1e-6) <= tick <= low * factor * (1 + 1e-6)
        assert math.log10(tick) == pytest.approx(round(math.log10(tick)))


@given(st.lists(NUMBERS, min_size=1))
def test_a_span_shows_every_value(values: list[float]) -> None:
    low, high = span(values)
    assert low < high and all(low <= value <= high for value in values)


def test_scales() -> None:
    assert Scale(0, 10, 0, 100)(2.5) == 25 and Scale(0, 10, 100, 0)(2.5) == 75
    assert Scale(0.01, 100, 0, 100, log=True)(1) == pytest.approx(50)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.5, "0.5"), (-12.3456, "−12.3"), (0, "0"), (1e-6, "1.00e-6"), (12345.6, "12,346"), (None, "–"), (math.nan, "–")],
)
def test_numbers_for_people(value: float | None, said: str) -> None:
    assert number(value) == said


def test_colours_and_sentences() -> None:
    assert mixed(0.5) == "color-mix(in oklab,var(--high) 50%,var(--zero))"
    assert mixed(-7) == "color-mix(in oklab,var(--low) 100%,var(--zero))"
    assert sentence("a Folder is") == "A Folder is."


def test_charts_are_xml_with_one_mark_per_point() -> None:
    lines = [Series("a<b", (Dot(0.1, 1, "x & y"), Dot(1, 2, "z"))), Series("c", (Dot(0, 3, "off a log axis"),))]
    drawn = ElementTree.fromstring(line_chart("t", lines, Axes("x", "y", log_x=True)))
    marks = [one for one in drawn.iter() if one.get("class") == "mark"]
    assert [one.get("data-tip") for one in marks] == ["x & y", "z"]
    heat = Heat(("r",), ("0", "1"), ((0.5, None),), "layer", "row")
    cells = [one.get("class") for one in ElementTree.fromstring(heat_map("t", heat)).iter("rect")]
    assert cells.count("cell") == 1 and cells.count("cell none") == 1
    bars = ElementTree.fromstring(bar_chart("t", [("a", 1.0, "one"), ("b", 0.0, "none")], "x", "y"))
    heights = [float(one.get("height", "")) for one in bars.iter("rect")]
    assert heights[1] == 0 < heights[0]


def test_the_neutral_colour_is_the_middle() -> None:
    heat = Heat(("r",), ("0",), ((0.25,),), "x", "y", middle=0.25, reach=0.75, reach_low=0.25)
    assert (heat.share(0.25), heat.share(1.0), heat.share(0.0)) == (0.0, 1.0, -1.0)


def test_csv_keeps_precision_and_quotes() -> None:
    table = Table("t", ("a", "b"), [(0.123456789012, 'say "x", y'), (None, "z")])
    assert as_csv(table) == 'a,b\n0.123456789012,"say ""x"", y"\n,z\n'
