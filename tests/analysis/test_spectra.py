"""Spectra agree with the plain decomposition, differences with the configs, candidates with their norms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmgraft.alignment import Alignment, align
from vlmgraft.analysis.bases import Candidate, compare_bases, name_base
from vlmgraft.analysis.differences import differences
from vlmgraft.analysis.spectra import measure_spectra, spectrum_of
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.spectral.factors import Factors


def decaying(rows: int, columns: int, decay: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    U, V = (torch.linalg.qr(torch.randn(size, rank, generator=generator))[0] for size in (rows, columns))
    return (U * torch.logspace(0, -decay, rank)) @ V.mT


@given(st.integers(2, 30), st.integers(2, 30), st.floats(0, 3))
def test_figures_are_those_of_the_plain_decomposition(rows: int, columns: int, decay: float) -> None:
    tau = decaying(rows, columns, decay)
    found, s = spectrum_of(tau, "t"), torch.linalg.svdvals(tau.double())
    energy = float(s.square().sum())
    assert found.exact and found.norm == pytest.approx(energy**0.5, rel=1e-4)
    assert found.effective_rank == pytest.approx(energy**2 / float(s.pow(4).sum()), rel=1e-3)
    assert found.stable_rank == pytest.approx(energy / float(s[0] ** 2), rel=1e-3)
    for count, share in found.first.items():
        assert share == pytest.approx(float(s[:count].square().sum()) / energy, rel=1e-3)


@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_large_matrices_are_estimated_closely(decay: float) -> None:
    tau = decaying(400, 500, decay)
    exact, found = spectrum_of(tau, "t"), spectrum_of(tau, "t", small=100)
    assert exact.exact and not found.exact
    assert found.effective_rank == pytest.approx(exact.effective_rank, rel=0.05)
    assert found.first == pytest.approx(exact.first, rel=0.02)


def test_a_zero_matrix_has_no_directions() -> None:
    found = spectrum_of(torch.zeros(4, 5), "t")
    assert (found.norm, found.effective_rank, found.shown) == (0.0, 0.0, ())


def test_every_merged_matrix_has_its_spectrum(alignment: Alignment, factors: dict[str, Factors]) -> None:
    found = {one.name: one for one in measure_spectra(alignment)}
    assert set(found) == {tensor.name for tensor in alignment.merged}
    for name, one in found.items():
        assert one.norm == pytest.approx(float(factors[name].s.norm()), rel=1e-5)
        assert [value for _, value in one.shown] == pytest.approx(
            [float(factors[name].s[index]) for index, _ in one.shown], rel=1e-4
        )


def test_the_lab_agrees_in_everything(alignment: Alignment) -> None:
    assert differences(alignment) == ()


@pytest.mark.parametrize(
    ("field", "value", "weight"),
    [("rope_theta", 1e6, "harmful"), ("num_key_value_heads", 4, "harmful"), ("vocab_size", 999, "note")],
)
def test_a_config_that_differs_is_named(trio: Path, tmp_path: Path, field: str, value: Any, weight: str) -> None:
    other = copytree(trio / "donor", tmp_path / "donor")
    config = json.loads((other / "config.json").read_text())
    if field == "rope_theta":
        config.pop("rope_parameters", None)
    config[field] = value
    (other / "config.json").write_text(json.dumps(config))
    checkpoints = [open_checkpoint(one) for one in (trio / "vlm", other, trio / "base")]
    found = [one for one in differences(align(*checkpoints)) if one.field == field]
    assert [(one.other, one.theirs, one.weight) for one in found] == [("donor", value, weight)]


def test_the_nearest_base_is_the_donors(trio: Path, alignment: Alignment) -> None:
    """The base against the VLM's own text weights in its place: the donor was tuned from the former."""
    wrong = replace(alignment, donor_base=alignment.donor, tensors=tuple(
        tensor._replace(donor_base=tensor.donor) for tensor in alignment.tensors
    ))  # fmt: skip
    found = compare_bases({"itself": wrong, "base": alignment})
    assert [one.base for one in found] == ["itself", "base"] and found[0].donor_ratio == 0
    assert "not its base" in name_base(found)
    rows = found[1].rows
    total = sum(row.donor_norm**2 for row in rows) / sum(row.weight_norm**2 for row in rows)
    assert found[1].donor_ratio == pytest.approx(total**0.5)


@pytest.mark.parametrize(
    ("ratio", "said"), [(0.4, "was tuned from near: far leaves a task vector 4.0"), (0.12, "not clearly")]
)
def test_how_clear_the_nearest_base_is(ratio: float, said: str) -> None:
    assert said in name_base([Candidate("near", 0.1, 0.1, ()), Candidate("far", ratio, 0.1, ())])
    assert "the only base given" in name_base([Candidate("near", 0.1, 0.1, ())])
