"""The page holds every section, its numbers, nothing from elsewhere, and is made without torch."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import POINTS

from vlmgraft.report.collect import collect
from vlmgraft.report.page import write_figures, write_report
from vlmgraft.storage.jsonl import write_rows

SECTIONS = ("tradeoff", "answers", "distances", "spectra", "directions", "gates", "layers", "receipt", "recipe")
VOID = {"meta", "link", "input", "img", "br"}


class Checker(HTMLParser):
    """Every tag is closed in order; ids are unique; texts by tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[key] for key in ("src", "href", "action") if found.get(key)]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.links += [dict(attrs)[key] for key in ("src", "href") if key in dict(attrs)]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    return checker


def test_every_section_is_there_and_well_formed(page: Path) -> None:
    found = checked(page.read_text())
    assert found.open == [] and len(found.ids) == len(set(found.ids))
    assert all(section in found.ids for section in SECTIONS)
    assert page.stat().st_size < 3_000_000


def test_nothing_is_fetched(page: Path) -> None:
    text = page.read_text()
    assert all(link.startswith(("#", "data:")) for link in checked(text).links)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", text)


def test_titles_say_the_finding(page: Path) -> None:
    text = checked(page.read_text()).text
    for said in (
        "At unchanged perception, FRISM <b> reasons best: 78 % against the VLM's 50 %",
        "How far donor and VLM have moved",
        "reasoning sits later than perception: centre of loss at layer 1.7 against 0.67",
        "Band 1 of 2 carries the most reasoning by itself: 70 % at λ 1",
        "The merge changed 1 of 2 tensors and took 50 % of the task vector's length",
        "VLM 0 right, merged 2 right",
        "8 directions per matrix hold 90 % of its energy",
        "The largest directions open (mean 0.88), the smallest go either way (mean 0.51)",
    ):
        assert said in text, said


def test_texts_from_runs_are_escaped(page: Path) -> None:
    text = page.read_text()
    assert "<script>alert" not in text and "FRISM <b>" not in text
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)" in text


def test_every_picture_has_its_numbers(page: Path) -> None:
    """Per section with a figure at least one table, its CSV with full precision."""
    text = page.read_text()
    for section in re.findall(r"<section id=\"[\w-]+\">.*?</section>", text, re.S):
        if "<figure" in section:
            assert "<table>" in section and "data:text/csv" in section
    found = re.search(r'download="points of sweep.csv" [^>]*href="data:text/csv;base64,([^"]+)"', text)
    assert found is not None
    lines = base64.b64decode(found[1]).decode().splitlines()
    assert lines[0].startswith("method,setting,reasoning %") and len(lines) == 1 + len(POINTS)
    assert lines[2].startswith("task arithmetic,λ 0.5,70.0,67.0,73.0,97.0,94.0,100.0,0.01,False")


def test_torch_is_not_loaded(runs: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from vlmgraft.report.page import write_report; "
        f"write_report([{str(runs / 'ranks')!r}], {str(tmp_path / 'r.html')!r}); "
        "bad = {'torch', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "r.html").is_file()


def test_a_part_alone_makes_a_page(tmp_path: Path) -> None:
    """The demo's rows and nothing else: one section, no empty ones."""
    write_rows(tmp_path / "results.jsonl", POINTS)
    text = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert re.findall(r"<section id=\"([\w-]+)\"", text) == ["tradeoff"]


def test_a_folder_of_choose_is_read(tmp_path: Path) -> None:
    """A rule that was dropped before the test has no accuracies, so it is no point."""
    dropped = {"method": "linear", "setting": "", "order": 0, "kl": 0.01, "fate": "dropped after round 1 of 4"}
    write_rows(tmp_path / "choose.jsonl", [*POINTS[:2], dropped])
    (run,) = collect([tmp_path]).points
    assert [row["method"] for row in run.rows] == ["VLM", "task arithmetic"]
    write_report([tmp_path], tmp_path / "report.html")
    assert "Perception against reasoning" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("error", [ValueError, KeyError])
@pytest.mark.parametrize("ours", ["sections._table", "charts.number", "charts.Lines.draw", "collect.nameless"])
def test_a_mistake_of_ours_is_no_bad_file(
    ours: str, error: type[Exception], runs: Path, tmp_path: Path, vlmgraft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error("ours")

    monkeypatch.setattr(f"vlmgraft.report.{ours}", broken)
    for folder in ("knockout", "sweep"):
        shutil.copytree(runs / folder, tmp_path / folder)
    with pytest.raises(error, match="ours"):
        vlmgraft("report", tmp_path, "--out", tmp_path / "r.html")
    if ours == "charts.Lines.draw":
        with pytest.raises(error, match="ours"):
            write_figures([tmp_path], tmp_path / "figures")


def test_names_are_written_as_they_are(tmp_path: Path) -> None:
    names = {"VLM": "VLM", "task arithmetic": "$\\frac{$", "FRISM <b>": "_cost in $"}
    rows = [row | {"method": names[row["method"]], "setting": "a $ and $b_$"} for row in POINTS]
    write_rows(tmp_path / "sweep.jsonl", rows)
    text = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert ">$\\frac{$</text>" in text and ">a $ and $b_$</text>" in text and "_cost in $" in text
