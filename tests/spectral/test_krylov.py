"""Krylov spaces: the largest directions, and what shows that some are missing."""

from __future__ import annotations

import pytest
import torch
from matrices import random_matrix

from vlmgraft.spectral import krylov
from vlmgraft.spectral.krylov import largest_outside, missed_outside, share_kept, suits
from vlmgraft.spectral.svd import decompose_matrix, decompose_naive


def test_krylov_takes_small_ranks_and_loses_little_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    tau = random_matrix(400, 200, "graded", 1) + 1e-3 * torch.randn(400, 200, generator=generator)
    result, twin = decompose_matrix(tau, 16), decompose_naive(tau)
    assert result.route == "krylov"
    best = float(twin.s[:16].double().square().sum()) / twin.energy
    assert best - 4e-5 <= result.kept <= best + 1e-6
    assert decompose_matrix(tau, 16).U.equal(result.U), "the same matrix gives the same factors"


def falling(rows: int, columns: int, exponent: float, seed: int = 0) -> torch.Tensor:
    """Singular values i^-exponent on random singular vectors."""
    Q, _, Ph = torch.linalg.svd(random_matrix(rows, columns, "noise", seed), full_matrices=False)
    return (Q * torch.arange(1, len(Ph) + 1).float() ** -exponent) @ Ph


@pytest.mark.parametrize("k", [1, 8, 16])
@pytest.mark.parametrize("exponent", [0.02, 0.1, 0.5])
def test_small_ranks_of_slowly_falling_spectra_are_the_largest_directions(exponent: float, k: int) -> None:
    """Five Krylov blocks keep up to 5 % less than the best truncation here, and inside their subspace all is well."""
    tau = falling(400, 200, exponent)
    result = decompose_matrix(tau, k)
    best = sum(i ** (-2 * exponent) for i in range(1, k + 1))
    assert float(result.s.double().square().sum()) >= (1 - 4e-3) * best
    assert float((result.U.mT @ tau - result.s[:, None] * result.Vh).norm()) <= 0.0101 * float(result.s.norm())


def test_a_basis_that_misses_the_largest_direction_is_not_complete() -> None:
    """Exact singular vectors without the first one: no leak, and outside a direction larger than those inside."""
    Q, _, Ph = torch.linalg.svd(random_matrix(60, 40, "noise", 0), full_matrices=False)
    s = torch.linspace(2, 1, 40)
    tau = (Q * s) @ Ph
    energy = float(tau.double().square().sum())
    assert missed_outside(tau, Q[:, :4], s[:4], Ph[:4], energy) == pytest.approx(float(s[4]), rel=0.03)
    assert missed_outside(tau, Q[:, 1:4], s[1:4], Ph[1:4], energy) is None
    assert largest_outside(tau, Ph[1:4]) == pytest.approx(2.0, rel=0.02)
    assert largest_outside(tau, Ph[:4]) <= float(s[4]) * (1 + 1e-5)
    leaky = Q[:, :1] + 0.02 * Q[:, 30:31]
    assert missed_outside(tau, leaky, s[:1], Ph[:1], energy) is None, "a leak of 1.3 %"
    low = (Q[:, :4] * s[:4]) @ Ph[:4]
    missed = missed_outside(low, Q[:, :4], s[:4], Ph[:4], float(low.double().square().sum()))
    assert missed is not None and missed < 1e-4


def test_deeper_krylov_spaces_come_before_the_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    depths: list[int] = []
    ordinary = krylov.krylov_basis
    monkeypatch.setattr(krylov, "krylov_basis", lambda tall, k, depth: depths.append(depth) or ordinary(tall, k, depth))
    assert decompose_matrix(falling(400, 200, 1.0), 4).route == "krylov" and depths == [5]
    depths.clear()
    result = decompose_matrix(falling(400, 200, 0.1), 16)
    assert result.route == "krylov" and depths == [5, 10] and 0 < result.missed <= 1.01 * float(result.s[-1])
    depths.clear()
    assert decompose_matrix(falling(400, 120, 0.1), 24).route == "gram" and depths == [5]


@pytest.mark.parametrize("shape", [(40, 700), (700, 400), (30, 30)])
@pytest.mark.parametrize("rank", [1, 12, 30, 40, 700])
def test_the_share_that_a_rank_holds_is_nearly_the_decompositions(shape: tuple[int, int], rank: int) -> None:
    """From below, and close even where the spectrum is that of noise, whose largest direction stands out least."""
    tau = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    squares = torch.linalg.svdvals(tau.double()).square()
    exact = float(squares[:rank].sum() / squares.sum())
    assert 0.9 * exact <= share_kept(tau, rank) <= exact + 1e-6
    assert share_kept(torch.zeros(shape), rank) == 1.0


def test_krylov_spaces_are_for_few_of_many_directions() -> None:
    """Five blocks of the rank fit into the width, and the rank is at most 256."""
    assert suits(256, 1280) and not suits(257, 9999)
    assert suits(20, 100) and not suits(20, 99)


def test_a_deeper_space_is_at_most_as_wide_as_the_whole() -> None:
    """Blocks of 24/2 + 4 = 16: ten of them are 160 columns."""
    tall = torch.randn(200, 160, generator=torch.Generator().manual_seed(0))
    assert [len(list(krylov.krylov_bases(part, 24))) for part in (tall, tall[:, :159])] == [2, 1]


@pytest.mark.parametrize(("outside", "passes"), [(1.005, True), (1.02, False)])
def test_a_direction_outside_may_be_one_percent_larger(outside: float, passes: bool) -> None:
    tau, inside = torch.diag(torch.tensor([outside, 1.0])), torch.tensor([[0.0], [1.0]])
    missed = missed_outside(tau, inside, torch.tensor([1.0]), inside.mT, outside**2 + 1)
    assert (missed is not None) == passes and (missed is None or missed == pytest.approx(outside))
