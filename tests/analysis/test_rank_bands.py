"""Bands of directions: they partition the spectrum, and together they are the task vector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_tools import LogitExam, bits, same_bits
from hypothesis import given, strategies as st

from vlmgraft.alignment import Alignment
from vlmgraft.analysis.bench import Bench
from vlmgraft.analysis.in_memory import Rebuilder
from vlmgraft.analysis.rank_bands import _band_only, band_of, measure_ranks, peaks, rank_cells
from vlmgraft.errors import RecipeError
from vlmgraft.spectral.factors import Factors

SPECTRA = st.lists(st.floats(0.001, 10), min_size=1, max_size=40).map(lambda s: torch.tensor(sorted(s, reverse=True)))


@given(SPECTRA, st.integers(1, 8), st.sampled_from(["rank", "energy"]))
def test_bands_partition_the_directions(s: torch.Tensor, of: int, by: Any) -> None:
    inside = [range(len(s))[band_of(s, band, of, by)] for band in range(of)]
    assert [index for band in inside for index in band] == list(range(len(s)))


@given(st.integers(1, 5), st.integers(1, 6))
def test_equal_bands_of_a_flat_spectrum(of: int, size: int) -> None:
    s = torch.ones(of * size)
    for by in ("rank", "energy"):
        assert [len(range(len(s))[band_of(s, band, of, by)]) for band in range(of)] == [size] * of  # type: ignore[arg-type]


def test_energy_bands_hold_about_equal_energy() -> None:
    s = torch.logspace(0, -2, 200)
    shares = [float(s[band_of(s, band, 4, "energy")].square().sum() / s.square().sum()) for band in range(4)]
    assert all(abs(share - 0.25) < 0.03 for share in shares)
    assert len(s[band_of(s, 0, 4, "energy")]) < len(s[band_of(s, 3, 4, "energy")])


def test_a_band_is_injected_alone_and_all_of_them_are_the_task_vector(
    vlm_model: Any, alignment: Alignment, factors: dict[str, Factors], tmp_path: Path
) -> None:
    before, exam = bits(vlm_model), LogitExam()
    distances: list[float] = []

    def distance(model: Any) -> float:
        now = model.state_dict()["model.language_model.layers.0.mlp.up_proj.weight"]
        distances.append(float((now - before["model.language_model.layers.0.mlp.up_proj.weight"]).norm()))
        return distances[-1]

    with Rebuilder(alignment, factors) as rebuilder:
        bench = Bench(vlm_model, None, exam, tmp_path, {}, kl_from=distance)
        rows = measure_ranks(bench, rebuilder, rank_cells(3, (2.0,), "rank"))
    assert same_bits(vlm_model, before)
    assert [(row["band"], row["scale"]) for row in rows] == [(None, 0), (None, 2), (0, 2), (1, 2), (2, 2)]
    s = factors["model.layers.0.mlp.up_proj.weight"].s
    expected = [0.0, 2 * float(s.norm())] + [2 * float(s[band_of(s, band, 3)].norm()) for band in range(3)]
    assert distances == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert sum(row["energy"] for row in rows[2:]) == pytest.approx(1) and rows[1]["energy"] == pytest.approx(1)
    assert rows[1]["injected"] == pytest.approx(2)
    with Rebuilder(alignment, factors) as rebuilder:
        again = LogitExam()
        same = measure_ranks(replace(bench, evaluator=again, resume=True), rebuilder, rank_cells(3, (2.0,), "rank"))
    assert same == rows and again.calls == 0


def test_every_expert_of_a_stack_has_its_own_band() -> None:
    stack = torch.stack([torch.logspace(0, -decay, 12) for decay in (0, 3)])
    cell = {"band": 0, "of": 3, "by": "energy"}
    kept = _band_only(stack, cell)
    assert [int((row != 0).sum()) for row in kept] == [4, 1]
    assert torch.equal(kept[1], _band_only(stack[1], cell))


def test_peaks_are_the_best_reasoning_of_each_band() -> None:
    rows = [
        {
            "band": band,
            "of": 2,
            "scale": scale,
            "energy": 1,
            "injected": 1,
            "perception": {},
            "reasoning": {"mean": mean},
        }
        for band, scale, mean in ((None, 0.0, 0.9), (None, 1.0, 0.5), (0, 1.0, 0.2), (0, 2.0, 0.4), (1, 1.0, 0.3))
    ]
    assert [(row["band"], row["scale"]) for row in peaks(rows)] == [(None, 1.0), (0, 2.0), (1, 1.0)]


def test_what_is_no_band() -> None:
    with pytest.raises(RecipeError, match="at least 1"):
        rank_cells(0, (1.0,), "rank")
    with pytest.raises(RecipeError, match="neither"):
        rank_cells(2, (1.0,), "size")  # type: ignore[arg-type]
