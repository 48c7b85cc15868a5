"""The page holds every section, its numbers, nothing from elsewhere, and is made without torch."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import POINTS, estimate, point

from vlmgraft.errors import CheckpointError, InputError, OutputError
from vlmgraft.report import page as page_module
from vlmgraft.report.collect import collect, layer_and_projection, read_gates
from vlmgraft.report.page import write_report
from vlmgraft.report.parts.layers import centre
from vlmgraft.report.parts.tradeoff import best, finding
from vlmgraft.storage.jsonl import write_json, write_rows

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


def test_gates_are_read_as_torch_reads_them(runs: Path) -> None:
    import torch

    from vlmgraft.spectral.gate_store import load_gates

    found, gates = read_gates(runs / "work" / "gates"), load_gates(runs / "work" / "gates")
    s = torch.linspace(1, 0.1, 32)
    for row in found.matrices:
        opened = gates.open(row["name"])
        assert row["open"] == pytest.approx(float(opened.mean()))
        assert row["injected"] == pytest.approx(float((opened * s).square().sum() / s.square().sum()), rel=1e-5)
        assert row["by_rank"][0] == pytest.approx(float(opened[:2].mean()))
        assert row["spread"][0] == pytest.approx(float(opened[:2].std(correction=0)), rel=1e-3)
    assert sum(found.histogram) == 6 * 32
    assert {(row["layer"], row["projection"]) for row in found.matrices} == {
        (layer, name) for layer in range(3) for name in ("q_proj", "up_proj")
    }


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.language_model.layers.3.self_attn.q_proj.weight", (3, "q_proj")),
        ("layers.12.mlp.experts.gate_up_proj", (12, "gate_up_proj")),
        ("lm_head.weight", None),
    ],
)
def test_places(name: str, place: tuple[int, str] | None) -> None:
    assert layer_and_projection(name) == place


def test_a_part_alone_makes_a_page(tmp_path: Path) -> None:
    """The demo's rows and nothing else: one section, no empty ones."""
    write_rows(tmp_path / "results.jsonl", POINTS)
    text = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert re.findall(r"<section id=\"([\w-]+)\"", text) == ["tradeoff"]


def evaluation(folder: Path, model: str, right: int) -> None:
    folder.mkdir(parents=True)
    averages = {kind: estimate(right / 4) for kind in ("reasoning", "perception")}
    write_json(folder / "summary.json", {"averages": averages})
    write_json(folder / "run.json", {"model": f"/models/{model}"})
    rows = [
        {
            "id": f"{task}/{place}",
            "key": "k",
            "task": task,
            "kind": kind,
            "prompt": f"{task}?",
            "expected": ["4", "four"],
        }
        | {"output": "said", "score": float(place < right)}
        for task, kind in (("sums", "reasoning"), ("looks", "perception"))
        for place in range(4)
    ]
    write_rows(folder / "records.jsonl", rows)


def test_evaluations_are_compared(tmp_path: Path) -> None:
    evaluation(tmp_path / "a", "base", 1)
    evaluation(tmp_path / "b", "merged", 3)
    write_json(tmp_path / "summary.json", ["not an evaluation"])
    found = collect([tmp_path])
    assert [(row["method"], row["reasoning"]["mean"]) for row in found.points[0].rows] == [
        ("base", 0.25),
        ("merged", 0.75),
    ]
    answers = found.answers[0].rows
    assert [row["task"] for row in answers[:4]] == ["sums", "looks", "sums", "looks"] and len(answers) == 8
    assert [one["right"] for one in answers[2]["answers"]] == [False, True] and answers[0]["expected"] == "4, four"
    text = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert "8 questions answered side by side: base 2 right, merged 6 right" in text


def test_what_cannot_be_reported_is_said(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such folder"):
        collect([tmp_path / "gone"])
    with pytest.raises(InputError, match="holds none of the files"):
        collect([tmp_path])
    copy = shutil.copytree(runs / "work" / "gates", tmp_path / "gates")
    (copy / "gates.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="not of a complete gates folder"):
        collect([tmp_path])
    monkeypatch.setattr(page_module, "MAX_BYTES", 1000)
    with pytest.raises(OutputError, match="fewer folders"):
        write_report([runs / "sweep"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_the_command_writes_the_page(vlmgraft: Callable[..., Any], runs: Path, tmp_path: Path) -> None:
    ran = vlmgraft("report", runs / "sweep", "--out", tmp_path / "page" / "r.html", "--title", "Mine & yours")
    assert ran.code == 0 and "<h1>Mine &amp; yours</h1>" in (tmp_path / "page" / "r.html").read_text()
    assert vlmgraft("report", tmp_path / "none").code == 2


def test_the_best_point_keeps_its_sight() -> None:
    top = best(POINTS)
    assert top is not None and top["method"] == "FRISM <b>"
    assert finding(POINTS[:1]) == "No point reasons better than the VLM and still sees as well"
    assert "every point" in finding([point("ties", 1, 0.5, 0.5, 0.1)])


def test_the_centre_is_where_the_loss_is() -> None:
    cells = [
        {"model": "m", "mode": "zero", "part": "both", "layer": layer, "reasoning_change": estimate(-loss)}
        for layer, loss in enumerate((0.0, 0.1, 0.3))
    ]
    assert centre(cells, "m", "zero", "reasoning") == pytest.approx((0.1 + 0.6) / 0.4)
    assert centre(cells[:1], "m", "zero", "reasoning") is None


def test_only_receipts_of_merges_are_shown(tmp_path: Path, runs: Path) -> None:
    """Stores of factors, adapters and tuned folders have receipts of another kind."""
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs" / "factors").mkdir()
    write_json(tmp_path / "runs" / "factors" / "receipt.json", {"tensors": [{"name": "U"}], "files": [], "digest": ""})
    assert len(collect([tmp_path / "runs"]).receipts) == len(collect([runs]).receipts) == 1
    write_report([tmp_path / "runs" / "factors", tmp_path / "runs" / "merged"], tmp_path / "page.html")


def test_a_folder_of_choose_is_read(tmp_path: Path) -> None:
    """A rule that was dropped before the test has no accuracies, so it is no point."""
    dropped = {"method": "linear", "setting": "", "order": 0, "kl": 0.01, "fate": "dropped after round 1 of 4"}
    write_rows(tmp_path / "choose.jsonl", [*POINTS[:2], dropped])
    (run,) = collect([tmp_path]).points
    assert [row["method"] for row in run.rows] == ["VLM", "task arithmetic"]
    write_report([tmp_path], tmp_path / "report.html")
    assert "Perception against reasoning" in (tmp_path / "report.html").read_text()
