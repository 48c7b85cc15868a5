"""decompose_matrix against its naive twin, and the edge cases a task vector can be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from matrices import random_matrix

from vlmgraft.errors import NumericalError, RecipeError
from vlmgraft.spectral import svd
from vlmgraft.spectral.svd import decompose_matrix, decompose_naive, matrix_cost, passes, probe


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


def test_energy_keeps_the_smallest_sufficient_rank() -> None:
    tau = random_matrix(30, 20, "graded", 5)
    result = decompose_matrix(tau, {"energy": 0.9})
    assert result.kept >= 0.9
    assert float(result.s[:-1].square().sum()) / result.energy < 0.9


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


def rotated(size: int, seed: int = 3) -> torch.Tensor:
    """A random orthogonal matrix, whose columns are no matrix's singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


@pytest.mark.filterwarnings("ignore:.*decomposed by LAPACK")
def test_a_basis_of_other_directions_does_not_pass_the_residual_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """An orthonormal basis, but not of singular vectors: QR makes U and V orthogonal, only the residual shows it."""
    tau = random_matrix(12, 9, "graded", 0)
    monkeypatch.setattr(svd, "_gram_basis", lambda tall: rotated(9))
    result = decompose_matrix(tau)
    assert result.route == "gesdd"
    assert torch.allclose(result.s, torch.linalg.svdvals(tau), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*decomposed by LAPACK")
@pytest.mark.parametrize(("angle", "passes"), [(3e-6, True), (1e-3, False)])
def test_the_residual_tolerance_is_one_in_a_hundred_thousand(
    angle: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right singular vectors turned by a small angle in one plane: Q R of B then has that angle as its residual."""
    tau = torch.diag(torch.tensor([2.0, 1.0, 0.0]))  # the zero makes the columns of B no basis, so that QR is needed
    turned = torch.eye(3, dtype=torch.float64)
    turned[0, 0] = turned[1, 1] = math.cos(angle)
    turned[0, 1], turned[1, 0] = -math.sin(angle), math.sin(angle)
    monkeypatch.setattr(svd, "_gram_basis", lambda tall: turned)
    assert (decompose_matrix(tau).route == "qr") == passes


@pytest.mark.filterwarnings("ignore:.*decomposed by LAPACK")
def test_a_basis_that_is_not_orthonormal_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    tau = random_matrix(12, 9, "noise", 0)
    V = torch.linalg.svd(tau.double()).Vh.mT
    monkeypatch.setattr(svd, "_gram_basis", lambda tall: 1.0001 * V)
    assert decompose_matrix(tau).route == "gesdd"
    monkeypatch.setattr(svd, "_gram_basis", lambda tall: V)
    assert decompose_matrix(tau).route == "gram"


def test_the_probes_measure_what_they_say() -> None:
    """Residual, and orthogonality errors, of factors whose errors are known: all three are relative Frobenius norms."""
    size = 400  # the more columns, the closer eight probes are to the norm
    eye, s = torch.eye(size), torch.linspace(2, 1, size)
    assert probe(torch.diag(s), eye, s, eye).tolist() == [0, 0, 0]
    residual, v_error, u_error = probe(torch.diag(1.01 * s), eye, s, eye).tolist()
    assert residual == pytest.approx(0.01, rel=1e-3) and v_error == u_error == 0
    assert float(probe(torch.diag(s), eye, s, 1.01 * eye)[1]) == pytest.approx(1.01**2 - 1, rel=1e-3)
    assert float(probe(torch.diag(s), 1.01 * eye, s, eye)[2]) == pytest.approx(1.01**2 - 1, rel=1e-3)
    assert float(probe(torch.zeros(3, 3), eye[:3, :3], torch.zeros(3), eye[:3, :3])[0]) == 0
    assert float(probe(torch.ones(3, 3), eye[:3, :3], torch.zeros(3), eye[:3, :3])[0]) == math.inf


@pytest.mark.parametrize(
    ("errors", "passed"),
    [((1e-5, 1e-5, 1e-3), True), ((1.1e-5, 0, 0), False), ((0, 1.1e-5, 0), False), ((0, 0, 1.1e-3), False)],
)
def test_the_tolerances_are_those_of_the_residual_of_v_and_of_u(errors: tuple[float, ...], passed: bool) -> None:
    assert bool(passes(torch.tensor(errors))) == passed


def test_energy_is_of_the_whole_matrix_and_kept_of_the_factors() -> None:
    tau = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    result = decompose_matrix(tau, 1)
    assert result.energy == pytest.approx(14.0, rel=1e-6) and result.kept == pytest.approx(9 / 14, rel=1e-6)
    assert decompose_matrix(torch.zeros(2, 3)).kept == 1.0


def test_costs_are_operations() -> None:
    """Gram matrix 2mn², B = τV 2mn², eigenvectors 10n³; Krylov: five products with τᵀτ, about 12mnk in all."""
    assert matrix_cost((300, 100)) == matrix_cost((100, 300)) == 4 * 300 * 100**2 + 10 * 100**3
    assert matrix_cost((8, 300, 100)) == 8 * matrix_cost((300, 100))
    assert matrix_cost((300, 100), 20) == 2 * 300 * 100 * 6 * 20
    assert matrix_cost((300, 100), 21) == matrix_cost((300, 100)), "five times the rank is beyond the width"
