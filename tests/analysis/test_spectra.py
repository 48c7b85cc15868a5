"""Spectra agree with the plain decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from vlmgraft.alignment import Alignment
from vlmgraft.analysis.spectra import measure_spectra, spectrum_of
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
