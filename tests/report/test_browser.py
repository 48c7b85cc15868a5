"""The page in headless Chromium: no error, plots drawn, filters and hover work, at two widths and in both themes.

Needs Playwright (`pip install playwright`) and a Chromium: Debian's package, or `playwright install chromium`.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    tab = context.new_page()
    tab.troubles = []
    tab.on("console", lambda message: tab.troubles.append(message.text))
    tab.on("pageerror", lambda error: tab.troubles.append(str(error)))
    tab.on("request", lambda request: tab.troubles.append(request.url) if request.url.startswith("http") else None)
    tab.goto(page.as_uri())
    yield tab
    assert tab.troubles == []
    context.close()


def test_pictures_are_drawn(opened: Any) -> None:
    sizes = opened.evaluate(
        "[...document.querySelectorAll('figure > svg')].filter(s => s.checkVisibility())"
        ".map(s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height])"
    )
    assert len(sizes) >= 12 and all(width > 200 and height > 60 for width, height in sizes)
    cells = "[...new Set([...document.querySelectorAll('.cell path')].map(c => getComputedStyle(c).fill))]"
    fills = opened.evaluate(cells)
    assert len(fills) > 5 and not any("black" in fill or fill == "rgb(0, 0, 0)" for fill in fills)


def test_no_picture_and_no_text_leaves_its_frame(opened: Any) -> None:
    for width in (1280, 390):
        opened.set_viewport_size({"width": width, "height": 900})
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        outside = opened.evaluate(
            "[...document.querySelectorAll('figure > svg text')].filter(t => t.checkVisibility()).filter(t => {"
            " const a = t.getBoundingClientRect(), b = t.closest('svg').getBoundingClientRect();"
            " return a.left < b.left - 3 || a.right > b.right + 3 || a.bottom > b.bottom + 3;"
            "}).map(t => t.textContent)"
        )
        assert outside == []


def test_filters_hide_series_rows_and_legend(opened: Any) -> None:
    section = opened.locator("#tradeoff")
    mine = section.locator('[data-method="task arithmetic"]')
    rows = [one for one in mine.all() if one.evaluate("element => element.tagName") == "TR"]
    assert len(rows) == 2 and mine.count() > 10  # and lines, marks, intervals and legends of two pictures
    section.get_by_role("checkbox", name="task arithmetic").uncheck()
    assert all(not one.is_visible() for one in mine.all())
    assert section.locator('g.mark[data-method="VLM"]').first.is_visible()
    section.get_by_role("checkbox", name="task arithmetic").check()
    assert mine.first.is_visible()


def test_filters_of_several_keys_work_together(opened: Any) -> None:
    section = opened.locator("#layers")
    shown = lambda: [one for one in section.locator("figure").all() if one.is_visible()]  # noqa: E731
    assert len(shown()) == 6
    section.get_by_role("checkbox", name="perception").uncheck()
    assert len(shown()) == 3
    section.get_by_role("checkbox", name="the VLM").uncheck()
    assert len(shown()) == 2
    section.get_by_role("checkbox", name="merge only this").uncheck()
    assert len(shown()) == 1


def test_the_pointer_and_the_keyboard_read_numbers(opened: Any) -> None:
    tip = opened.locator("#tip")
    assert not tip.is_visible()
    opened.locator('#tradeoff g.mark[data-method="VLM"]').first.hover()
    assert tip.is_visible() and "VLM, reasoning 50.0 %, perception 99.0 %" in tip.inner_text()
    opened.locator("h1").hover()
    assert not tip.is_visible()
    opened.locator("#layers .cell").first.focus()
    assert "layer 0" in tip.inner_text()
    opened.keyboard.press("Escape")
    assert not tip.is_visible()


def test_numbers_can_be_downloaded(opened: Any, tmp_path: Path) -> None:
    details = opened.locator("#tradeoff details")
    details.locator("summary").click()
    with opened.expect_download() as download:
        details.get_by_text("CSV").click()
    download.value.save_as(tmp_path / "points.csv")
    assert (tmp_path / "points.csv").read_text().startswith("method,setting")


def test_pictures_can_be_downloaded(opened: Any, tmp_path: Path) -> None:
    figure = opened.locator("#tradeoff figure").first
    for kind in ("SVG", "PDF"):
        with opened.expect_download() as download:
            figure.get_by_text(kind, exact=True).click()
        download.value.save_as(tmp_path / kind)
    text = (tmp_path / "SVG").read_text()
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and "task arithmetic" in text
    assert not re.search(r"stroke: *var\(|fill: *var\(", text), "colours are written out, for programs without CSS"
    assert (tmp_path / "PDF").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_no_rule_of_accessibility_is_broken(opened: Any) -> None:
    """axe-core, as `axe-core-python` carries it: WCAG 2.1 A and AA, light and dark, and on a phone."""
    axe = files(pytest.importorskip("axe_core_python", reason="pip install axe-core-python")) / "axe.min.js"
    opened.evaluate(axe.read_text(encoding="utf-8"))
    rules = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}
    for theme, width in (("light", 1280), ("dark", 1280), ("light", 390)):
        opened.emulate_media(color_scheme=theme)
        opened.set_viewport_size({"width": width, "height": 900})
        broken = opened.evaluate("rules => axe.run(document, rules)", rules)["violations"]
        assert [(rule["id"], rule["nodes"][0]["html"][:200], len(rule["nodes"])) for rule in broken] == []


def test_light_and_dark(opened: Any) -> None:
    colour = lambda: opened.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    before = colour()
    opened.locator("#theme").click()
    after = colour()
    assert before != after
    opened.locator("#theme").click()
    assert colour() == before
    opened.emulate_media(media="print", color_scheme="dark")
    assert colour() == "rgb(255, 255, 255)" and not opened.locator("nav").is_visible()
