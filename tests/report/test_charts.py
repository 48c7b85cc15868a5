"""Charts: values in their places, every mark with its numbers, nothing lost on the way to a picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image
from report_runs import ROWS

from vlmgraft.report import charts
from vlmgraft.report.charts import PALETTE, Bars, Chart, Dot, Heat, Lines, Series, save_chart, svg_and_pdf
from vlmgraft.report.parts.tradeoff import tradeoff_chart


def drawn(chart: Chart) -> ElementTree.Element:
    """The SVG of the page, parsed; links inside it are given their name space, which HTML does by itself."""
    svg, pdf = svg_and_pdf(chart, "a <title>", "salt")
    assert pdf.startswith(b"%PDF")
    return ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))


def marks(chart: Chart) -> list[str | None]:
    return [mark.get("aria-label") for mark in drawn(chart).iter() if "mark" in (mark.get("class") or "")]


def test_one_mark_per_point_says_its_numbers() -> None:
    lines = [Series("a<b", (Dot(0.1, 1, "x & 'y'"), Dot(1, 2, "z"))), Series("c", (Dot(0, 3, "off a log axis"),))]
    assert marks(Lines(lines, "x", "y", log_x=True)) == ["x & 'y'", "z"]
    heat = Heat(("r",), ("0", "1"), ((0.5, None),), "layer", "row")
    assert marks(heat) == ["row r, layer 0: 0.5"]
    assert marks(Bars([("a", 1.0, "high"), ("b", 0.0, "none")], "x", "y")) == ["high", "none"]


def test_a_cell_is_mixed_of_the_pages_colours() -> None:
    heat = Heat(("r",), ("0", "1"), ((0.5, -0.25),), "layer", "row")
    styles = [mark.get("style") for mark in drawn(heat).iter() if "mark" in (mark.get("class") or "")]
    assert styles == ["--end:var(--high);--share:50%", "--end:var(--low);--share:25%"]


def test_the_neutral_colour_is_the_middle() -> None:
    heat = Heat(("r",), ("0",), ((0.25,),), "x", "y", middle=0.25, reach=0.75, reach_low=0.25)
    assert (heat.share(0.25), heat.share(1.0), heat.share(0.0)) == (0.0, 1.0, -1.0)


def test_ids_of_two_pictures_of_a_page_differ_and_other_colours_are_left() -> None:
    chart = tradeoff_chart(ROWS)
    first, second = (svg_and_pdf(chart, "t", salt)[0] for salt in ("a", "b"))
    ids = [set(re.findall(r'id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    assert svg_and_pdf(chart, "t", "a")[0] == first, "the same rows are the same page"
    assert not re.findall(r"#[0-9a-f]{6}", first), "every colour is the page's, light or dark"


def test_png_opens_and_shows_something(tmp_path: Path) -> None:
    save_chart(tradeoff_chart(ROWS), tmp_path / "tradeoff.png", "a finding")
    with Image.open(tmp_path / "tradeoff.png") as image:
        assert image.format == "PNG" and min(image.size) > 500
        colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    seen = {tuple(colour) for colour in colours.tolist()}
    assert {(0, 114, 178), (213, 94, 0)} <= seen, "task arithmetic and FRISM in their colours"


def test_the_page_draws_in_the_colours_of_the_pictures() -> None:
    css = (Path(charts.__file__).parent / "page.css").read_text()
    for theme in (css, css[css.index('data-theme="light"') :]):
        light = theme[theme.index("--s0") :]
        assert [light.split(f"--s{index}: ")[1][:7] for index in range(len(PALETTE))] == list(PALETTE)
        ends = [theme.split(f"--{end}: ")[1][:7] for end in ("low", "zero", "high")]
        assert ends == list(charts.SCALE)


def test_labels_of_points_do_not_lie_on_each_other() -> None:
    near = [Dot(10 + x / 100, 10, f"tip {x}", label=f"λ {x}") for x in range(4)]
    far = [Dot(90, 90, "tip", label="far")]
    texts = [
        one.text for one in drawn(Lines([Series("a", (*near, *far))], "x", "y")).iter() if one.tag.endswith("text")
    ]
    assert [text for text in texts if text and text[0] in "λf"] == ["λ 0", "far"]
