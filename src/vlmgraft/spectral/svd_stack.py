"""SVD of fused experts [experts, out, in], a few experts at a time as one batch.

The same arithmetic as for one matrix (`svd.py`): float64 Gram matrix of the short side, its eigenvectors, B = τV, and a
check with random probes. An expert that does not pass is decomposed alone, with the fallbacks of `svd.py`. Small ranks
are cut from the full decomposition, because experts are small.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from vlmgraft.errors import NumericalError
from vlmgraft.spectral.rank import Rank, check_rank, directions_kept
from vlmgraft.spectral.svd import NOT_CONVERGED, SVD, decompose_matrix, from_columns, passes, probe

WORKSPACE = 2 * 10**9
"""Bytes of float64 Gram matrices and copies that one batch of experts may take."""


def decompose_stack(tau: Float[Tensor, "experts out in"], rank: Rank = "full", *, name: str = "task vector") -> SVD:
    """SVD of every expert, as one `SVD` with a leading dimension; raises NumericalError naming tensor and expert.

    All experts keep the same number of directions: with {energy: share} as many as the expert that needs most. error:
    the largest of the experts; energy: their sum; route: "gram", and how many were decomposed alone, if any.
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
    kept = directions_kept(s, rank)
    U, s, Vh = U[..., :kept].contiguous(), s[:, :kept].contiguous(), Vh[:, :kept].contiguous()
    if flipped:
        U, Vh = Vh.mT.contiguous(), U.mT.contiguous()
    return SVD(U, s, Vh, error, float(energies.sum()), f"gram, {alone} alone" if alone else "gram")


def _batch(tall: Float[Tensor, "b m n"], name: str) -> tuple[Tensor, Tensor, Tensor, float, int]:
    """U, s, Vh, the largest residual, and how many experts had to be decomposed alone."""
    wide = tall.double()
    U, s, Vh = from_columns(tall, _eigenvectors(wide.mT @ wide).flip(-1))
    errors = probe(tall, U, s, Vh)
    worst, alone = 0.0, 0
    for index, passed in enumerate(passes(errors).tolist()):
        if passed:
            worst = max(worst, float(errors[index, 0]))
            continue
        single = decompose_matrix(tall[index], name=name)
        U[index], s[index], Vh[index] = single.U, single.s, single.Vh
        worst, alone = max(worst, single.error), alone + 1
    return U, s, Vh, worst, alone


def _eigenvectors(gram: Tensor) -> Tensor:
    """Eigenvectors of every matrix; all NaN if one does not converge: the check fails and each is decomposed alone."""
    try:
        return torch.linalg.eigh(gram).eigenvectors
    except NOT_CONVERGED:
        return torch.full_like(gram, math.nan)
