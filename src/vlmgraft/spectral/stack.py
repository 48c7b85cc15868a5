"""SVD of fused experts [experts, out, in], a few experts at a time as one batch.

The same arithmetic as for one matrix (`svd.py`): float64 Gram matrix of the short side, its eigenvectors, B = τV, and a
check with random probes. An expert that does not pass is decomposed alone, with that file's fallbacks. Small ranks are
cut from the full decomposition: experts are small.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from vlmgraft.errors import NumericalError
from vlmgraft.spectral.svd import (
    NOT_CONVERGED,
    PROBES,
    RESIDUAL_TOLERANCE,
    SVD,
    U_TOLERANCE,
    V_TOLERANCE,
    Rank,
    check_rank,
    decompose_matrix,
    rank_for_energy,
)

WORKSPACE = 2 * 10**9
"""Bytes of float64 Gram matrices and copies that one batch of experts may take."""


def decompose_stack(tau: Float[Tensor, "experts out in"], rank: Rank = "full", *, name: str = "task vector") -> SVD:
    """SVD of every expert, as one `SVD` with a leading dimension; raises NumericalError naming tensor and expert.

    All experts keep the same number of directions: with {energy: share} as many as the neediest one. error: the largest
    of the experts; energy: their sum; route: "gram", or how many were decomposed alone.
    """
    check_rank(rank)
    if tau.ndim != 3 or 0 in tau.shape:
        raise NumericalError(f"{name}: shape {tuple(tau.shape)} is not a stack of matrices with entries")
    tau = tau.detach().float()
    energies = torch.linalg.vector_norm(tau, dim=(1, 2), dtype=torch.float64).square()
    if not bool(energies.isfinite().all()):
        bad = int((~energies.isfinite()).nonzero()[0])
        raise NumericalError(f"{name}, expert {bad}: holds NaN or infinity; look at the checkpoint it was read from")
    flipped = tau.shape[1] < tau.shape[2]
    tall = tau.mT if flipped else tau
    per_expert = 8 * (tall.shape[1] * tall.shape[2] + 3 * tall.shape[2] ** 2)
    parts = [_batch(piece, name) for piece in tall.split(max(1, WORKSPACE // per_expert))]
    U, s, Vh = (torch.cat([part[i] for part in parts]) for i in range(3))
    error = max(part[3] for part in parts)
    alone = sum(part[4] for part in parts)
    kept = s.shape[1]
    if isinstance(rank, int):
        kept = min(rank, kept)
    elif not isinstance(rank, str):
        kept = max(rank_for_energy(row, rank["energy"]) for row in s)
    U, s, Vh = U[..., :kept].contiguous(), s[:, :kept].contiguous(), Vh[:, :kept].contiguous()
    if flipped:
        U, Vh = Vh.mT.contiguous(), U.mT.contiguous()
    return SVD(U, s, Vh, error, float(energies.sum()), f"gram, {alone} alone" if alone else "gram")


def _batch(tall: Float[Tensor, "b m n"], name: str) -> tuple[Tensor, Tensor, Tensor, float, int]:
    """U, s, Vh, the largest residual, and how many experts had to be decomposed alone."""
    wide = tall.double()
    V = _eigenvectors(wide.mT @ wide).flip(-1).float()
    B = tall @ V
    s, order = torch.linalg.vector_norm(B, dim=1).sort(dim=1, descending=True, stable=True)
    take = order[:, None, :]
    U = B.take_along_dim(take, 2) / s[:, None, :].clamp_min(torch.finfo(torch.float32).tiny)
    Vh = V.take_along_dim(take, 2).mT.contiguous()
    errors, passed = _probe(tall, U, s, Vh)
    worst, alone = 0.0, 0
    for index in range(len(tall)):
        if bool(passed[index]):
            worst = max(worst, float(errors[index]))
            continue
        single = decompose_matrix(tall[index], name=name)
        U[index], s[index], Vh[index] = single.U, single.s, single.Vh
        worst, alone = max(worst, single.error), alone + 1
    return U, s, Vh, worst, alone


def _eigenvectors(gram: Tensor) -> Tensor:
    """Of every matrix; NaN where one does not converge, which the check finds: those experts are decomposed alone."""
    try:
        return torch.linalg.eigh(gram).eigenvectors
    except NOT_CONVERGED:
        return torch.full_like(gram, math.nan)


def _probe(tau: Tensor, U: Tensor, s: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Relative residual per expert, and whether residual and orthogonality are within `svd.py`'s tolerances."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    probe = torch.randn(s.shape[1], PROBES, generator=generator).to(tau.device)
    inside = Vh.mT @ probe
    image = U @ (s[..., None] * probe)

    def norm(value: Tensor) -> Tensor:
        return torch.linalg.vector_norm(value, dim=(1, 2))

    scale = norm(image)
    residual = norm(tau @ inside - image)
    error = torch.where(scale > 0, residual / scale.clamp_min(1e-30), torch.where(residual == 0, 0.0, math.inf))
    size = norm(probe[None])
    v_error, u_error = norm(Vh @ inside - probe) / size, norm(U.mT @ (U @ probe) - probe) / size
    return error, (error <= RESIDUAL_TOLERANCE) & (v_error <= V_TOLERANCE) & (u_error <= U_TOLERANCE)
