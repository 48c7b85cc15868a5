"""What gates let through: how far they are open by rank and matrix, and how their training went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlmgraft.report.gate_folder import BINS, GatedRun
from vlmgraft.report.parts.gates import gates


def matrix(layer: int | None, opened: list[float], directions: int = 32, **more: Any) -> dict[str, Any]:
    mean = sum(opened) / len(opened)
    name = "lm_head.weight" if layer is None else f"model.layers.{layer}.mlp.up_proj.weight"
    row = {"name": name, "layer": layer, "projection": "up_proj", "directions": directions, "open": mean}
    row |= {"above_half": 0.5, "by_rank": opened, "spread": [0.1] * BINS, "injected": None}
    return {**row, **more}


def run(*matrices: dict[str, Any], log: Any = (), **settings: Any) -> GatedRun:
    return GatedRun(Path("run"), settings, list(log), list(matrices), [0, 10, 30])


FALLING = [1 - part / BINS for part in range(BINS)]


@pytest.mark.parametrize(
    ("opened", "said"),
    [
        (FALLING, "The largest directions open (mean 1.00), the smallest close (mean 0.06)"),
        (FALLING[::-1], "The largest directions close (mean 0.06), the smallest open (mean 1.00)"),
        ([0.5] * BINS, "The largest directions are divided (mean 0.50), the smallest go either way (mean 0.50)"),
    ],
)
def test_the_title_compares_the_largest_with_the_smallest(opened: list[float], said: str) -> None:
    assert gates(run(matrix(0, opened), matrix(1, opened))).title == said


def test_the_map_by_rank_is_the_mean_of_a_layers_matrices() -> None:
    """Two matrices of layer 0, one of layer 3, and one outside the layers, which only the table has."""
    section = gates(run(matrix(0, [0.2] * BINS), matrix(0, [0.6] * BINS), matrix(3, FALLING), matrix(None, FALLING)))
    chart = section.figures[0].chart
    assert chart.rows == ["0", "3"]
    assert chart.values[0] == pytest.approx([0.4] * BINS) and chart.values[1] == pytest.approx(FALLING)
    assert [row[1] for row in section.tables[0].rows] == [0, 0, 3, None]


def test_too_few_directions_for_sixteenths_are_counted_open_or_closed() -> None:
    """A quarter of 20 and all of 60 gates are 65 of 80."""
    few = [0.5, *[None] * (BINS - 1)]
    rows = [matrix(0, [0.5], 20, by_rank=few, above_half=0.25), matrix(1, [0.5], 60, by_rank=few, above_half=1.0)]
    assert gates(run(*rows)).title == "81 % of the gates were opened"


def test_most_and_least_are_named_and_the_energy_of_all() -> None:
    rows = [matrix(layer, FALLING, injected=share) for layer, share in ((0, 0.3), (1, 0.05), (2, 0.7))]
    said = " ".join(gates(run(*rows, energy=0.421, inject="donor", inject_weight=3.0, scale=1.0, steps=20)).text)
    assert "Most is let through in up_proj of layer 2 (70 %), least in up_proj of layer 1 (5 %)." in said
    assert "All gates together inject 42.1 % of the task vector's energy." in said
    assert "λ 1, 20 steps, injection by donor matching" in said and "weight 3." in said


def test_the_histogram_is_in_percent_and_training_is_drawn_from_two_steps_on() -> None:
    log = [{"step": step, "kl": 0.1 / (1 + step), "energy": None} for step in range(3)]
    captions = {figure.caption: figure.chart for figure in gates(run(matrix(0, FALLING), log=log)).figures}
    assert [height for _, height, _ in captions["Gates by how far they are open"].bars] == [0.0, 25.0, 75.0]
    (kl,) = captions["KL from the VLM during training"].series
    assert [dot.y for dot in kl.dots] == pytest.approx([0.1, 0.05, 0.1 / 3])
    assert "Injected energy during training" not in captions
    alone = [figure.caption for figure in gates(run(matrix(0, FALLING), log=log[:1])).figures]
    assert "KL from the VLM during training" not in alone
