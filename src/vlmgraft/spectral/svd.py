"""Exact and truncated SVD of one task-vector matrix, with an a-posteriori check.

Shapes: τ [out, in], r = min(out, in) unless truncated, U [out, r], s [r] descending, Vh [r, in]; float32 results.

The full decomposition takes the eigenvectors V of the float64 Gram matrix of the short side and reads U and s from
B = τV. The Gram matrix squares the condition number, so in float64 directions down to 1e-8 of the largest singular
value are accurate, as gates on single directions require, while in float32 they would not be. Small ranks use
block Krylov iteration (`krylov.py`). Every result is tested with random probes. A result that fails is orthogonalised
by QR of B. If it still fails, LAPACK's gesdd decomposes the matrix, or gesvd where gesdd does not converge. Both are
slow; their use is warned of, and recorded as `route` with the factors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlmgraft.errors import NumericalError
from vlmgraft.spectral import krylov
from vlmgraft.spectral.rank import Rank, check_rank, directions_kept

NOT_CONVERGED = (torch.linalg.LinAlgError, numpy.linalg.LinAlgError)  # type: ignore[attr-defined]
"""What torch, numpy and scipy raise if a decomposition does not converge; torch does not declare its own error."""
RESIDUAL_TOLERANCE = 1e-5
V_TOLERANCE = 1e-5
U_TOLERANCE = 1e-3
PROBES = 8
GRAM_BLOCK = 256


@dataclass(frozen=True)
class SVD:
    """Factors of one matrix: τ ≈ U diag(s) Vh.

    error: relative residual between τ and the factors, estimated by random probes inside span(V).
    energy: ‖τ‖_F², including truncated directions; Σ s² / energy is the share that a truncation keeps.
    route: which algorithm produced the factors ("gram", "qr", "krylov", "gesdd", "gesvd").
    missed: for a Krylov result, a lower estimate (power steps) of the largest singular value outside the factors.
    """

    U: Float[Tensor, "out r"]
    s: Float[Tensor, " r"]
    Vh: Float[Tensor, "r in"]
    error: float
    energy: float
    route: str
    missed: float = 0.0

    @property
    def kept(self) -> float:
        """Share of ‖τ‖_F² inside the factors; 1 for a zero matrix."""
        return float(self.s.double().square().sum()) / self.energy if self.energy > 0 else 1.0


def decompose_matrix(tau: Float[Tensor, "out in"], rank: Rank = "full", *, name: str = "task vector") -> SVD:
    """SVD of τ, truncated to `rank`, on τ's device; raises NumericalError (with `name`) on NaN or infinity."""
    check_rank(rank)
    if tau.ndim != 2 or 0 in tau.shape:
        raise NumericalError(f"{name}: shape {tuple(tau.shape)} is not a matrix with entries")
    tau = tau.detach().float()
    energy = float(torch.linalg.vector_norm(tau, dtype=torch.float64).square())
    if not math.isfinite(energy):  # squares of float32 values cannot overflow float64
        bad = int((~torch.isfinite(tau)).sum())
        raise NumericalError(f"{name}: {bad} values are NaN or infinite; look at the checkpoint it was read from")
    flipped = tau.shape[0] < tau.shape[1]
    tall = tau.mT if flipped else tau
    count = rank if isinstance(rank, int) else tall.shape[1]
    result = _checked(tall, energy, count, name)
    if isinstance(rank, Mapping):
        result = _truncate(result, directions_kept(result.s, rank))
    if flipped:
        return replace(result, U=result.Vh.mT.contiguous(), Vh=result.U.mT.contiguous())
    return result


def matrix_cost(shape: Sequence[int], rank: Rank = "full") -> float:
    """Floating-point operations of one decomposition, up to a constant factor: Gram matrix, eigenvectors, B = τV."""
    if len(shape) == 3:
        return shape[0] * matrix_cost(shape[1:])
    m, n = max(shape), min(shape)
    if isinstance(rank, int) and krylov.suits(rank, n):
        return 2.0 * m * n * (krylov.DEPTHS[0] + 1) * rank
    return 4.0 * m * n * n + 10.0 * n**3


def decompose_naive(tau: Float[Tensor, "out in"], name: str = "task vector") -> SVD:
    """Plain float64 decomposition by LAPACK's gesdd, else gesvd: reference for the fast routes in tests, and their last
    resort. Raises NumericalError where neither converges, or s is beyond float32."""
    route = "gesdd"
    try:
        U, s, Vh = torch.linalg.svd(tau.double(), full_matrices=False)
    except NOT_CONVERGED:
        U, s, Vh = _gesvd(tau, name)
        route = "gesvd"
    energy = float(torch.linalg.vector_norm(tau, dtype=torch.float64).square())
    U, s, Vh = U.float().contiguous(), s.float(), Vh.float().contiguous()
    if not bool(s.isfinite().all()):
        raise NumericalError(f"{name}: its singular values are beyond float32; leave it out of `modules`")
    return SVD(U, s, Vh, float(probe(tau.float(), U, s, Vh)[0]), energy, route)


def _gesvd(tau: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """SVD by QR iteration, slower and more robust than gesdd's divide and conquer."""
    from scipy.linalg import svd  # type: ignore[import-untyped]

    try:
        factors = svd(tau.double().cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
    except (*NOT_CONVERGED, ValueError) as error:
        raise NumericalError(f"{name}: its SVD does not converge ({error}); leave it out of `modules`") from error
    U, s, Vh = (torch.from_numpy(part).to(tau.device) for part in factors)
    return U, s, Vh


def _last_resort(tall: Tensor, count: int, name: str, why: str) -> SVD:
    """LAPACK's decomposition, with a warning that it was needed."""
    result = decompose_naive(tall, name)
    warnings.warn(f"{name}: the fast SVD {why}; decomposed by LAPACK's {result.route}", RuntimeWarning, stacklevel=4)
    return _truncate(result, count)


def _checked(tall: Tensor, energy: float, count: int, name: str) -> SVD:
    """The first result that passes its checks, cut to `count` directions: Krylov spaces of increasing depth for small
    ranks, the Gram matrix, gesdd."""
    try:
        for V in krylov.krylov_bases(tall, count) if krylov.suits(count, tall.shape[1]) else ():
            result = _probed(tall, energy, V, "krylov")
            if result is not None:
                missed = krylov.missed_outside(tall, result.U, result.s, result.Vh, energy)
                if missed is not None:
                    return replace(result, missed=missed)
        result = _probed(tall, energy, _gram_basis(tall), "gram")
    except NOT_CONVERGED:
        return _last_resort(tall, count, name, "did not converge")
    if result is None:
        return _last_resort(tall, count, name, "did not pass its check")
    return _truncate(result, count)


def _probed(tall: Tensor, energy: float, V: Float[Tensor, "n k"], route: str) -> SVD | None:
    """The factors from a basis of right singular vectors, by columns or else by QR; None if neither passes."""
    for label, finish in ((route, from_columns), ("qr", _from_qr)):
        U, s, Vh = finish(tall, V)
        errors = probe(tall, U, s, Vh)
        if passes(errors):
            return SVD(U, s, Vh, float(errors[0]), energy, label)
    return None


def _truncate(result: SVD, k: int) -> SVD:
    if k >= len(result.s):
        return result
    return replace(result, U=result.U[:, :k].contiguous(), s=result.s[:k].clone(), Vh=result.Vh[:k].contiguous())


def _gram_basis(tall: Float[Tensor, "m n"]) -> Float[Tensor, "n n"]:
    """Right singular vectors as columns, float64, largest first.

    On the CPU by numpy's dsyrk and dsyevd (OpenBLAS): on an AMD EPYC they take 0.7 and 0.8 of the time of torch's
    product and eigh (MKL). numpy computes the product of a matrix with its own transpose by dsyrk.
    """
    wide = tall.double()
    if wide.device.type != "cpu":
        return torch.linalg.eigh(_upper_gram(wide), UPLO="U").eigenvectors.flip(1)
    array = wide.contiguous().numpy()
    return torch.from_numpy(numpy.linalg.eigh(array.T @ array)[1]).flip(1)


def _upper_gram(wide: Float[Tensor, "m n"]) -> Float[Tensor, "n n"]:
    """Upper triangle of wideᵀ wide, zeros below: by block rows, with 5/8 of the work of the whole product."""
    width = wide.shape[1]
    gram = wide.new_zeros(width, width)
    step = max(GRAM_BLOCK, -(-width // 4))
    for at in range(0, width, step):
        gram[at : at + step, at:] = wide[:, at : at + step].mT @ wide[:, at:]
    return gram


def from_columns(tall: Float[Tensor, "*b m n"], V: Float[Tensor, "*b n k"]) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and Vh from the normalised columns and the column norms of B = τV (float32 product: reconstruction error
    3e-7), for one matrix or a batch."""
    V = V.float()
    B = tall @ V
    s, order = torch.linalg.vector_norm(B, dim=-2).sort(dim=-1, descending=True, stable=True)
    columns = order[..., None, :]
    U = B.take_along_dim(columns, -1) / s[..., None, :].clamp_min(torch.finfo(torch.float32).tiny)
    return U, s, V.take_along_dim(columns, -1).mT.contiguous()


def _from_qr(tall: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U and s from the QR of B = τV in float64: columns of B whose norm is rounding noise get orthonormal partners.

    R is diagonal up to sqrt(float64 epsilon) of the largest singular value: R_ij ≤ min(s_j, ε s_1²/s_i) for j > i.
    """
    V = V.double()
    Q, R = torch.linalg.qr(tall.double() @ V)
    diagonal = R.diagonal()
    s, order = diagonal.abs().sort(descending=True, stable=True)
    U = Q * torch.where(diagonal < 0, -1.0, 1.0)
    return U[:, order].float().contiguous(), s.float(), V[:, order].mT.float().contiguous()


def probe(tau: Float[Tensor, "*b m n"], U: Tensor, s: Tensor, Vh: Tensor) -> Float[Tensor, "*b 3"]:
    """Relative residual inside span(V), and orthogonality errors of V and U, each from a few Gaussian probes; for one
    matrix, or for each of a batch.

    A Gaussian probe's squared image is an unbiased estimate of a squared Frobenius norm; with 8 probes the estimate is
    within a factor of 2 with overwhelming probability, and the tolerances allow for it.
    """
    generator = torch.Generator(device="cpu").manual_seed(1)
    x = torch.randn(s.shape[-1], PROBES, generator=generator).to(tau.device)
    inside = Vh.mT @ x
    image = U @ (s[..., None] * x)

    def norm(value: Tensor) -> Tensor:
        return torch.linalg.vector_norm(value, dim=(-2, -1))

    scale, residual = norm(image), norm(tau @ inside - image)
    error = torch.where(scale > 0, residual / scale, torch.where(residual == 0, 0.0, math.inf))
    return torch.stack([error, norm(Vh @ inside - x) / norm(x), norm(U.mT @ (U @ x) - x) / norm(x)], dim=-1)


def passes(errors: Float[Tensor, "*b 3"]) -> Bool[Tensor, "*b"]:
    """Whether the errors from `probe` are within the tolerances."""
    residual, v_error, u_error = errors.unbind(-1)
    return (residual <= RESIDUAL_TOLERANCE) & (v_error <= V_TOLERANCE) & (u_error <= U_TOLERANCE)
