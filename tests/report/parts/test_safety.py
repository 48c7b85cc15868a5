"""How far the models moved, and how concentrated the donor's change is."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import distances as rows_of_distances

from vlmgraft.report.collect import Run
from vlmgraft.report.page import write_report
from vlmgraft.report.parts.safety import distances, spectra
from vlmgraft.storage.jsonl import write_rows


def test_distances_are_maps_of_layers_and_groups() -> None:
    section = distances(Run(Path("run"), [*rows_of_distances(), rows_of_distances()[0] | {"layer": None}]), {})
    ratio, own, cosine = (figure.chart for figure in section.figures)
    assert ratio.rows == ["attention", "mlp"] and ratio.columns == ["0", "1", "2"]
    assert ratio.values == [[0.1] * 3] * 2 and own.values == [[0.08] * 3] * 2
    assert cosine.values[0] == pytest.approx([-0.1, 0.0, 0.1]) and cosine.reach == pytest.approx(0.1)
    assert ratio.one_sided and not cosine.one_sided
    assert len(section.tables[0].rows) == 7, "what stands outside the layers is in the table only"


def test_an_inspection_says_what_agrees_and_names_bases_without_their_folders() -> None:
    bases = [{"base": "/home/me/base", "donor_ratio": 0.1, "vlm_ratio": 0.2}]
    found: dict[str, Any] = {"base": "from /home/me/base it is nearest", "bases": bases, "differences": []}
    text = distances(Run(Path("run"), rows_of_distances()), found).text
    assert text[1:] == [
        "From base it is nearest.",
        "Heads, rotary settings, biases and vocabulary of all models agree.",
    ]
    row = {"field": "rope_theta", "other": "donor", "vlm": 1, "theirs": 2, "weight": "harmful", "meaning": "m"}
    section = distances(Run(Path("run"), rows_of_distances()), {**found, "differences": [row]})
    assert not any("agree" in paragraph for paragraph in section.text)
    assert section.tables[1].rows == [("rope_theta", "donor", "1", "2", "harmful", "m")]
    assert section.tables[2].rows == [("/home/me/base", 0.1, 0.2)]


def spectrum(layer: int, norm: float, eight: float, rank: float, shown: list[list[float]]) -> dict[str, Any]:
    row = {"name": f"model.layers.{layer}.mlp.up_proj.weight", "layer": layer, "group": "mlp", "shape": [10, 20]}
    first = {"1": 0.1, "8": eight, "64": 1.0}
    return {**row, "norm": norm, "effective_rank": rank, "stable_rank": 2.0, "shown": shown, "first": first}


def test_energy_counts_by_the_square_of_the_norm() -> None:
    """(0.9 · 1² + 0.2 · 3²) / (1² + 3²) = 0.27."""
    rows = [spectrum(0, 1.0, 0.9, 2.0, [[0, 4.0], [1, 2.0]]), spectrum(1, 3.0, 0.2, 5.0, [[0, 1.0], [1, 0.1]])]
    section = spectra(Run(Path("run"), rows))
    assert section.title == "The donor's change is spread out: 8 directions per matrix hold 27 % of its energy"
    assert "An effective rank is 20 to 50 %" in section.text[0]
    (curve,) = section.figures[0].chart.series
    assert [dot.x for dot in curve.dots] == [1, 2] and [dot.y for dot in curve.dots] == pytest.approx([1.0, 0.3])
    assert section.figures[1].chart.values == [[2.0, 5.0]]
    assert "concentrated: 8 directions" in spectra(Run(Path("run"), rows[:1])).title


def test_layers_and_changes_that_are_not_there_are_not_drawn(runs: Path, tmp_path: Path) -> None:
    """As `inspect` leaves it where only embeddings are merged, and where donor and base are the same."""
    for name, change in (("distances", {"layer": None}), ("spectra", {"layer": None}), ("spectra", ZERO)):
        rows = [json.loads(text) | change for text in (runs / "inspect" / f"{name}.jsonl").read_text().splitlines()]
        folder = tmp_path / f"{name} {len(change)}"
        folder.mkdir()
        write_rows(folder / f"{name}.jsonl", rows)
        text = write_report([folder], folder / "r.html").read_text()
        assert f'<section id="{name}"' in text and text.count("<figure") == (change is not ZERO and name == "spectra")
    assert "The donor's tuning changed none of these matrices" in html.unescape(text)


ZERO = {"norm": 0.0, "effective_rank": 0.0, "stable_rank": 0.0, "first": {"1": 0.0, "8": 0.0, "64": 0.0}, "shown": []}
