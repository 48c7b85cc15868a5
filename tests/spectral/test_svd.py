"""decompose_matrix against its naive twin, and the edge cases a task vector can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlmgraft.errors import NumericalError, RecipeError
from vlmgraft.spectral import svd
from vlmgraft.spectral.svd import decompose_matrix, decompose_naive, rank_for_energy


def random_matrix(rows: int, columns: int, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(rows, columns, generator=generator)
    if kind == "noise":
        return plain
    if kind == "zero":
        return torch.zeros(rows, columns)
    if kind == "deficient":
        k = max(1, min(rows, columns) // 3)
        return torch.randn(rows, k, generator=generator) @ torch.randn(k, columns, generator=generator)
    Q, _, Ph = torch.linalg.svd(plain, full_matrices=False)
    if kind == "repeated":
        return 0.3 * Q @ Ph
    spectrum = 10.0 ** -torch.linspace(0, 6, min(rows, columns))  # "graded"
    return (Q * spectrum) @ Ph


def orthogonality(basis: torch.Tensor) -> float:
    basis = basis.double()
    return float((basis.mT @ basis - torch.eye(basis.shape[1], dtype=torch.float64)).abs().max())


KINDS = ["noise", "zero", "deficient", "repeated", "graded"]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from(KINDS), st.integers(0, 10_000))
@example(5, 8, "graded", 3860)
def test_full_rank_agrees_with_the_naive_twin(rows: int, columns: int, kind: str, seed: int) -> None:
    tau = random_matrix(rows, columns, kind, seed)
    result, twin = decompose_matrix(tau), decompose_naive(tau)
    scale = max(float(twin.s.max()), 1e-30)
    assert result.U.shape == twin.U.shape and result.Vh.shape == twin.Vh.shape
    assert torch.allclose(result.s, twin.s, atol=2e-6 * scale)
    assert bool((result.s[:-1] >= result.s[1:]).all()) and bool((result.s >= 0).all())
    rebuilt = (result.U * result.s) @ result.Vh
    assert float((rebuilt - tau).norm()) <= 5e-6 * max(float(tau.norm()), 1e-30)
    long, short = (result.U, result.Vh.mT) if rows >= columns else (result.Vh.mT, result.U)
    assert orthogonality(long) <= 5e-3 and orthogonality(short) <= 5e-5  # V of the tall matrix comes from eigenvectors
    assert result.error <= 1e-5
    assert result.kept == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (1, 7), (7, 1)])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_truncation_is_the_best_rank_k_approximation(shape: tuple[int, int], k: int) -> None:
    tau = random_matrix(*shape, "graded", 3)
    result, twin = decompose_matrix(tau, k), decompose_naive(tau)
    k = min(k, *shape)
    assert result.s.shape == (k,) and result.U.shape == (shape[0], k) and result.Vh.shape == (k, shape[1])
    optimum = float(twin.s[k:].norm())
    assert float(((result.U * result.s) @ result.Vh - tau).norm()) <= optimum * 1.001 + 2e-6


def test_krylov_takes_small_ranks_and_loses_little_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    tau = random_matrix(400, 200, "graded", 1) + 1e-3 * torch.randn(400, 200, generator=generator)
    result, twin = decompose_matrix(tau, 16), decompose_naive(tau)
    assert result.route == "krylov"
    best = float(twin.s[:16].double().square().sum()) / twin.energy
    assert best - 4e-5 <= result.kept <= best + 1e-6
    assert decompose_matrix(tau, 16).U.equal(result.U), "the same matrix gives the same factors"


def test_energy_keeps_the_smallest_sufficient_rank() -> None:
    tau = random_matrix(30, 20, "graded", 5)
    result = decompose_matrix(tau, {"energy": 0.9})
    assert result.kept >= 0.9
    assert float(result.s[:-1].square().sum()) / result.energy < 0.9
    assert rank_for_energy(torch.tensor([2.0, 1.0, 1.0]), 1.0) == 3
    assert rank_for_energy(torch.zeros(4), 0.5) >= 1


def test_rank_deficient_directions_come_from_the_qr_route() -> None:
    result = decompose_matrix(random_matrix(40, 20, "deficient", 2))
    assert result.route == "qr"
    assert orthogonality(result.U) <= 1e-5


def test_a_failing_fast_route_falls_back_to_gesdd(monkeypatch: pytest.MonkeyPatch) -> None:
    tau = random_matrix(12, 9, "noise", 0)
    monkeypatch.setattr(svd, "_gram_basis", lambda tall: torch.ones(9, 9, dtype=torch.float64))
    result = decompose_matrix(tau)
    assert result.route == "gesdd" and result.error <= 1e-5

    def fail(tall: torch.Tensor) -> torch.Tensor:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(svd, "_gram_basis", fail)
    assert decompose_matrix(tau).route == "gesdd"


def test_bad_values_are_named() -> None:
    tau = torch.ones(3, 4)
    tau[1, 2] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.0\.q: 1 values are NaN"):
        decompose_matrix(tau, name="layers.0.q")
    with pytest.raises(NumericalError, match="not a matrix"):
        decompose_matrix(torch.ones(3))
    for rank in (0, -1, True, "half", {"energy": 1.5}, {"share": 0.5}):
        with pytest.raises(RecipeError, match="rank"):
            decompose_matrix(torch.ones(2, 2), rank)  # type: ignore[arg-type]


def test_the_blocked_gram_matrix_is_the_plain_one() -> None:
    wide = random_matrix(40, 700, "noise", 4).double()
    assert torch.allclose(svd._upper_gram(wide).triu(), (wide.mT @ wide).triu(), atol=1e-10)
