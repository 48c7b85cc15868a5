"""Spectra that replace the singular values of a task vector: W = W_vlm + λ·U diag(f(s)) Vh, decompose once, choose f.

Pure functions of s, the singular values in descending order, float32 [r]; the result has as many entries, zeros where a
direction is closed. Sums are float64. With f(s) = s this is task arithmetic; f(s) = σ(g) ⊙ s is FRISM (`gates.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmgraft.spectral.svd import Rank, check_rank, rank_for_energy

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def truncate(s: Float[Tensor, " r"], rank: Rank) -> Float[Tensor, " r"]:
    """s_i for i ≤ k, else 0. rank: k, "full", or {"energy": η} for the smallest k with Σ_{i≤k} s² ≥ η Σ s²."""
    return _first(s, _count(s, rank))


def rank_one(s: Float[Tensor, " r"], rank: Rank = 1, *, energy: float | None = None) -> Float[Tensor, " r"]:
    """The same value for i ≤ k, else 0, with the Frobenius norm of all of s: ‖s‖₂/√k; k = 1 is ‖τ‖_F u₁v₁ᵀ.

    From the Selective-RL paper of 2026 (unreviewed), there with k = 1; equal values for k > 1 are our reading.
    energy: Σ s² of the whole spectrum when `s` holds only its largest values.
    """
    total = float(s.double().square().sum()) if energy is None else energy
    count = _count(s, rank)
    return _first(s.new_full(s.shape, (total / count) ** 0.5), count)


def star(s: Float[Tensor, " r"], eta: float) -> Float[Tensor, " r"]:
    """STAR (arXiv 2502.10339): the smallest k with Σ_{i≤k} s ≥ η Σ s, rescaled to the old nuclear norm Σ s."""
    cumulative = s.double().cumsum(0)
    if eta >= 1 or not float(cumulative[-1]) > 0:
        return s.clone()
    count = int((cumulative < eta * cumulative[-1]).sum()) + 1
    return (_first(s, count).double() * (cumulative[-1] / cumulative[count - 1])).to(s.dtype)


def iso(s: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
    """Iso-C (arXiv 2502.04959): the mean of s everywhere. Made for sums of many task vectors; with one donor it is a
    negative control."""
    return s.new_full(s.shape, float(s.double().mean()))


def _count(s: Tensor, rank: Rank) -> int:
    check_rank(rank)
    if rank == "full":
        return len(s)
    return min(rank, len(s)) if isinstance(rank, int) else rank_for_energy(s, rank["energy"])


def _first(s: Tensor, count: int) -> Tensor:
    kept = s.clone()
    kept[count:] = 0
    return kept
