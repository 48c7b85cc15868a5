"""The first singular directions of a matrix by block Krylov iteration, and bounds on what they miss.

Block Krylov iteration is Musco & Musco's (arXiv 1504.05477), on the tall side: τ [m, n], m ≥ n. The checks of `svd.py`
only test the subspace that was found. Two numbers measure what lies outside it: the leak ‖τᵀU − V diag(s)‖_F / ‖s‖,
zero for singular vectors, and the largest singular value of τ(I − VVᵀ), by power steps, over the smallest one kept.
If the spectrum decays slowly, five blocks do not pass; then ten, twenty, and the full decomposition are tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

MAX_RANK = 256
DEPTHS = (5, 10, 20)
LEAK_TOLERANCE = 0.01
"""With both tolerances, spectra i^-0.01 to i^-0.5 lose at most 0.4 % of the energy that the best truncation keeps."""
MISSED_TOLERANCE = 0.01
"""A direction outside may be this much larger, relatively, than the smallest inside: equal ones are interchangeable."""
POWER_STEPS = 6
POWER_VECTORS = 8


def suits(k: int, width: int) -> bool:
    """Whether `k` of `width` directions are few enough for a Krylov space to be cheaper than the full decomposition."""
    return k <= MAX_RANK and DEPTHS[0] * k <= width


def krylov_bases(tall: Float[Tensor, "m n"], k: int) -> Iterator[Float[Tensor, "n k"]]:
    """`krylov_basis` for increasing depths, while the Krylov space is smaller than the whole space."""
    width = tall.shape[1]
    for depth in DEPTHS:
        if depth > DEPTHS[0] and depth * _block(width, k) > width:
            return
        yield krylov_basis(tall, k, depth)


def krylov_basis(tall: Float[Tensor, "m n"], k: int, depth: int = DEPTHS[0]) -> Float[Tensor, "n k"]:
    """Right singular vectors of the k largest singular values, float64, from a block Krylov space of τᵀτ.

    Block size k/2 + 4 and depth 5 lose 1e-5 to 4e-5 of the energy on task vectors. The seed is fixed: equal matrices
    give equal factors, so that gates remain valid.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    width = tall.shape[1]
    Q = torch.randn(width, _block(width, k), generator=generator).to(tall.device)
    blocks = []
    for _ in range(depth):
        Q = torch.linalg.qr(tall.mT @ (tall @ Q)).Q
        blocks.append(Q)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1).double()).Q[:, :width]
    image = (tall @ basis.float()).double()
    rotation = torch.linalg.eigh(image.mT @ image).eigenvectors.flip(1)[:, :k]
    return basis @ rotation


def _block(width: int, k: int) -> int:
    return min(width, k // 2 + 4)


def share_kept(tau: Float[Tensor, "out in"], rank: int) -> float:
    """Share of ‖τ‖_F² in the `rank` largest directions: a fast lower estimate from one Krylov space, not checked;
    exact if that space is the whole space. 1 for a zero matrix."""
    tall = (tau.mT if tau.shape[0] < tau.shape[1] else tau).float()
    width, energy = tall.shape[1], float(torch.linalg.vector_norm(tall, dtype=torch.float64).square())
    if rank >= width or energy == 0:
        return 1.0
    if DEPTHS[0] * _block(width, rank) >= width:
        squares = torch.linalg.eigvalsh((tall.mT @ tall).double())[-rank:]
    else:
        squares = (tall @ krylov_basis(tall, rank).float()).double().square()
    return min(1.0, float(squares.sum()) / energy)


def missed_outside(tall: Tensor, U: Tensor, s: Tensor, Vh: Tensor, energy: float) -> float | None:
    """The largest singular value outside truncated factors; None if they leak or it exceeds the smallest inside.

    energy: ‖τ‖_F². The energy outside is ‖τ‖_F² − Σ s², which bounds the value from above at no cost.
    """
    norm = torch.linalg.vector_norm
    if float(norm(tall.mT @ U - Vh.mT * s)) > LEAK_TOLERANCE * float(norm(s)):
        return None
    rest = math.sqrt(max(0.0, energy - float(s.double().square().sum())))
    missed = min(rest, largest_outside(tall, Vh))
    return missed if missed <= (1 + MISSED_TOLERANCE) * float(s[-1]) else None


def largest_outside(tall: Float[Tensor, "m n"], Vh: Float[Tensor, "k n"]) -> float:
    """Lower estimate of the largest singular value of τ(I − VVᵀ), by power steps from a few Gaussian vectors."""
    generator = torch.Generator(device="cpu").manual_seed(2)
    x = torch.randn(tall.shape[1], POWER_VECTORS, generator=generator).to(tall.device)
    largest = 0.0
    for _ in range(POWER_STEPS):
        for _ in range(2):  # twice: if nothing is outside, the first difference is rounding noise
            x = x - Vh.mT @ (Vh @ x)
            x = x / torch.linalg.vector_norm(x, dim=0).clamp_min(torch.finfo(torch.float32).tiny)
        image = tall @ x
        largest = max(largest, float(torch.linalg.vector_norm(image, dim=0).max()))
        x = tall.mT @ image
    return largest
