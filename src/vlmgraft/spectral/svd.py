"""Exact and truncated SVD of one task-vector matrix, with an a-posteriori check.

Shapes: τ [out, in], r = min(out, in) unless truncated, U [out, r], s [r] descending, Vh [r, in]; float32 results.

The full decomposition takes the eigenvectors V of the float64 Gram matrix of the short side and reads U and s from
B = τV. The Gram matrix squares the condition number, so in float64 directions down to 1e-8 of the largest singular
value come out right, while in float32 they would not: gates on single directions need the former. Small ranks use
block Krylov iteration (Musco & Musco, arXiv 1504.05477). Every result is tested with random probes; what fails is
orthogonalised by QR of B, and what still fails is handed to LAPACK's gesdd, and where that does not converge to its
gesvd. Either is slow; that it was needed is warned of, and stands as `route` with the factors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from vlmgraft.errors import NumericalError, RecipeError

Rank = int | Literal["full"] | Mapping[str, float]

NOT_CONVERGED = (torch.linalg.LinAlgError, numpy.linalg.LinAlgError)  # type: ignore[attr-defined]
"""What torch, numpy and scipy raise; torch does not declare its own."""
RESIDUAL_TOLERANCE = 1e-5
V_TOLERANCE = 1e-5
U_TOLERANCE = 1e-3
PROBES = 8
KRYLOV_MAX_RANK = 256
KRYLOV_DEPTH = 5
GRAM_BLOCK = 256


@dataclass(frozen=True)
class SVD:
    """Factors of one matrix: τ ≈ U diag(s) Vh.

    error: relative residual of the factors against what they claim, estimated by random probes inside span(V).
    energy: ‖τ‖_F², kept or not; Σ s² / energy is the share that a truncation keeps.
    route: which algorithm produced the factors ("gram", "qr", "krylov", "gesdd", "gesvd").
    """

    U: Float[Tensor, "out r"]
    s: Float[Tensor, " r"]
    Vh: Float[Tensor, "r in"]
    error: float
    energy: float
    route: str

    @property
    def kept(self) -> float:
        """Share of ‖τ‖_F² inside the factors; 1 for a zero matrix."""
        return float(self.s.double().square().sum()) / self.energy if self.energy > 0 else 1.0


def check_rank(rank: Rank) -> None:
    """Raise RecipeError unless rank is "full", a positive integer or {"energy": share in (0, 1]}."""
    if rank == "full" or (isinstance(rank, int) and not isinstance(rank, bool) and rank > 0):
        return
    if isinstance(rank, Mapping) and set(rank) == {"energy"} and 0 < rank["energy"] <= 1:
        return
    raise RecipeError(f'rank: {rank!r} is not "full", a positive integer or {{energy: share in (0, 1]}}')


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
    wanted = rank if isinstance(rank, int) else tall.shape[1]
    result = _checked(tall, energy, wanted, name)
    if isinstance(rank, Mapping):
        result = _truncate(result, rank_for_energy(result.s, rank["energy"]))
    if flipped:
        return replace(result, U=result.Vh.mT.contiguous(), Vh=result.U.mT.contiguous())
    return result


def rank_for_energy(s: Float[Tensor, " r"], share: float) -> int:
    """Smallest k ≥ 1 with Σ_{i≤k} s² ≥ share · Σ s²; every direction when share is 1."""
    if share >= 1:
        return len(s)
    cumulative = s.double().square().cumsum(0)
    return min(len(s), int((cumulative < share * cumulative[-1]).sum()) + 1)


def decompose_naive(tau: Float[Tensor, "out in"], name: str = "task vector") -> SVD:
    """The plain float64 decomposition by LAPACK's gesdd: twin of the fast routes in tests, and their last resort; by
    gesvd where gesdd does not converge. Raises NumericalError where neither does, or s is beyond float32."""
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
    return SVD(U, s, Vh, _probe(tau.float(), U, s, Vh)[0], energy, route)


def _gesvd(tau: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """By QR iteration, slower than gesdd's divide and conquer and sturdier."""
    from scipy.linalg import svd  # type: ignore[import-untyped]

    try:
        found = svd(tau.double().cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
    except (*NOT_CONVERGED, ValueError) as error:
        raise NumericalError(f"{name}: its SVD does not converge ({error}); leave it out of `modules`") from error
    U, s, Vh = (torch.from_numpy(part).to(tau.device) for part in found)
    return U, s, Vh


def _last_resort(tall: Tensor, wanted: int, name: str, why: str) -> SVD:
    """LAPACK's decomposition, and a warning that it was needed."""
    result = decompose_naive(tall, name)
    warnings.warn(f"{name}: the fast SVD {why}; decomposed by LAPACK's {result.route}", RuntimeWarning, stacklevel=4)
    return _truncate(result, wanted)


def _checked(tall: Tensor, energy: float, wanted: int, name: str) -> SVD:
    """Fast route, then QR of B, then gesdd: the first that passes the probes, cut to `wanted` directions."""
    width = tall.shape[1]
    krylov = wanted <= KRYLOV_MAX_RANK and KRYLOV_DEPTH * wanted <= width
    try:
        V = _krylov_basis(tall, wanted) if krylov else _gram_basis(tall)
    except NOT_CONVERGED:
        return _last_resort(tall, wanted, name, "did not converge")
    for route, finish in (("krylov" if krylov else "gram", _from_columns), ("qr", _from_qr)):
        U, s, Vh = finish(tall, V)
        error, v_error, u_error = _probe(tall, U, s, Vh)
        if error <= RESIDUAL_TOLERANCE and v_error <= V_TOLERANCE and u_error <= U_TOLERANCE:
            return _truncate(SVD(U, s, Vh, error, energy, route), wanted)
    return _last_resort(tall, wanted, name, "did not pass its check")


def _truncate(result: SVD, k: int) -> SVD:
    if k >= len(result.s):
        return result
    return replace(result, U=result.U[:, :k].contiguous(), s=result.s[:k].clone(), Vh=result.Vh[:k].contiguous())


def _gram_basis(tall: Float[Tensor, "m n"]) -> Float[Tensor, "n n"]:
    """Right singular vectors as columns, float64, largest first.

    On the CPU by dsyrk and dsyevd as numpy brings them (OpenBLAS): on an AMD EPYC they take 0.7 and 0.8 of the time of
    torch's product and eigh (MKL). numpy hands the product of a matrix with its own transpose to dsyrk.
    """
    wide = tall.double()
    if wide.device.type != "cpu":
        return torch.linalg.eigh(_upper_gram(wide), UPLO="U").eigenvectors.flip(1)
    array = wide.contiguous().numpy()
    return torch.from_numpy(numpy.linalg.eigh(array.T @ array)[1]).flip(1)


def _upper_gram(wide: Float[Tensor, "m n"]) -> Float[Tensor, "n n"]:
    """Upper triangle of wideᵀ wide, and zeros: by block rows, which is 5/8 of the whole product's work."""
    width = wide.shape[1]
    gram = wide.new_zeros(width, width)
    step = max(GRAM_BLOCK, -(-width // 4))
    for at in range(0, width, step):
        gram[at : at + step, at:] = wide[:, at : at + step].mT @ wide[:, at:]
    return gram


def _krylov_basis(tall: Float[Tensor, "m n"], k: int) -> Float[Tensor, "n k"]:
    """Right singular vectors of the k largest singular values, float64, from a block Krylov space of τᵀτ.

    Block k/2 + 4 and depth 5 lose 1e-5 to 4e-5 of the energy on task vectors. The seed is fixed: the same matrix gives
    the same factors, so that gates carry over.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    width = tall.shape[1]
    block = min(width, k // 2 + 4)
    Q = torch.randn(width, block, generator=generator).to(tall.device)
    blocks = []
    for _ in range(KRYLOV_DEPTH):
        Q = torch.linalg.qr(tall.mT @ (tall @ Q)).Q
        blocks.append(Q)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1).double()).Q[:, :width]
    image = (tall @ basis.float()).double()
    rotation = torch.linalg.eigh(image.mT @ image).eigenvectors.flip(1)[:, :k]
    return basis @ rotation


def _from_columns(tall: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U and s as the normalised columns and the column norms of B = τV (float32 product: 3e-7 in reconstruction)."""
    V = V.float()
    B = tall @ V
    s = torch.linalg.vector_norm(B, dim=0)
    s, order = s.sort(descending=True, stable=True)
    U = B[:, order] / s.clamp_min(torch.finfo(torch.float32).tiny)
    return U, s, V[:, order].mT.contiguous()


def _from_qr(tall: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U and s from the QR of B = τV in float64: columns of B whose norm is rounding noise get orthonormal partners.

    R is diagonal to sqrt(float64 epsilon) of the largest singular value: R_ij ≤ min(s_j, ε s_1²/s_i) for j > i.
    """
    V = V.double()
    Q, R = torch.linalg.qr(tall.double() @ V)
    diagonal = R.diagonal()
    s, order = diagonal.abs().sort(descending=True, stable=True)
    U = Q * torch.where(diagonal < 0, -1.0, 1.0)
    return U[:, order].float().contiguous(), s.float(), V[:, order].mT.float().contiguous()


def _probe(tau: Tensor, U: Tensor, s: Tensor, Vh: Tensor) -> tuple[float, float, float]:
    """Relative residual inside span(V), and orthogonality errors of V and U, each from a few Gaussian probes.

    A Gaussian probe's squared image is an unbiased estimate of a squared Frobenius norm; with 8 probes the estimate is
    within a factor of 2 with overwhelming probability, and the tolerances have room for it.
    """
    generator = torch.Generator(device="cpu").manual_seed(1)
    probe = torch.randn(len(s), PROBES, generator=generator).to(tau.device)
    inside = Vh.mT @ probe
    image = U @ (s[:, None] * probe)
    norm = torch.linalg.vector_norm
    scale, residual = float(norm(image)), float(norm(tau @ inside - image))
    error = residual / scale if scale > 0 else (0.0 if residual == 0 else float("inf"))
    v_error = float(norm(Vh @ inside - probe) / norm(probe))
    u_error = float(norm(U.mT @ (U @ probe) - probe) / norm(probe))
    return error, v_error, u_error
