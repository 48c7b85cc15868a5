"""Model Breadcrumbs (arXiv 2312.06795): both task vectors without their smallest and their largest entries.

    W = W_vlm_base + λ·(w₁·β(τ_vlm) + w₂·β(τ))             τ_vlm = W_vlm − W_vlm_base,  τ = W_donor − W_base

Of the n entries of a tensor, β drops the ⌊γ·n⌋ of largest magnitude as outliers and keeps the next ⌊density·n⌋; where
fewer are left, fewer outliers are dropped, as in mergekit. The paper writes γ for the quantile below the outliers
(1 − γ here). Each matrix of a stack of experts is thinned by itself. Entries that tie with a boundary are all
kept; mergekit breaks such ties by position, and drops every entry where ⌊γ·n⌋ is 0. With an `election`, signs are
elected and merged as in `ties`: mergekit's `breadcrumbs_ties` is `election: weighted`, `combine: sum`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from vlmgraft.methods.base import Number, TensorContext, check_range, number_for
from vlmgraft.methods.task_vectors import Election, SignMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Breadcrumbs(SignMethod):
    """Drop the smallest entries and the outliers, then add."""

    name: ClassVar[str] = "breadcrumbs"
    whole_tensors: ClassVar[bool] = True

    gamma: Number = 0.01
    """γ, the share of the entries that are dropped as outliers, 0 to 1."""
    election: Election = field(default="none", kw_only=True)
    """Election of signs, as in `ties`; with none, the default, both task vectors are added."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "gamma", low=0, high=1)

    def thinned(self, tau: Tensor, source: str, context: TensorContext) -> Tensor:
        """β(τ) of one matrix or vector."""
        return without_extremes(tau, self.density_of(source, context), number_for(self.gamma, context, "gamma"))


def without_extremes(tau: Tensor, density: float, outliers: float) -> Tensor:
    """Zero τ except the ⌊density·n⌋ entries that follow the ⌊outliers·n⌋ largest in magnitude; in place."""
    if density >= 1:
        return tau
    count = tau.numel()
    kept = int(density * count)
    largest = min(int(outliers * count), count - kept)
    magnitude = tau.abs().flatten()
    high = magnitude.kthvalue(count - largest).values
    low = magnitude.kthvalue(count - largest - max(kept, 1) + 1).values
    return tau.mul_((magnitude >= low).mul_(magnitude <= high).view(tau.shape))
