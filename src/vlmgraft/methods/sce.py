"""SCE (FuseChat, arXiv 2408.07990): select where the task vectors differ, weigh them by energy, erase the minority.

    τ₁ = W_vlm − W_vlm_base,  τ₂ = W_donor − W_base
    select   keep the ⌊density·n⌋ entries with the largest variance over τ₁ and τ₂ (n: those whose variance is not 0)
    weigh    w_t = Σ τ_t² / (Σ τ₁² + Σ τ₂²), over the selected entries of the tensor
    erase    drop the τ_t whose sign is not that of τ₁ + τ₂, entry by entry
    W        = W_vlm_base + λ·Σ w_t τ_t / Σ w_t                                          sums over the τ_t that are left

Each matrix of a stack of experts is merged by itself. Entries that tie in variance with the last one are all selected,
and where τ₁ + τ₂ = 0 nothing is added; mergekit breaks the first kind of tie by position and elects "+" for the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlmgraft.methods.base import Method, Number, TensorContext, check_range, number_for
from vlmgraft.methods.task_vectors import merge_signs, per_matrix, task_vectors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sce(Method):
    """Select, calculate, erase."""

    name: ClassVar[str] = "sce"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base", "vlm_base"})
    whole_tensors: ClassVar[bool] = True

    density: Number = 1.0
    """Share of the entries that is selected, above 0 to 1."""
    scale: Number = 1.0
    """λ, a factor on the merged task vector."""

    def __post_init__(self) -> None:
        check_range(self, "density", low=0, high=1, above=True)
        check_range(self, "scale")

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm_base + λ·(the weighted mean of the entries that agree), matrix by matrix."""
        density = number_for(self.density, context, "density")
        scale = number_for(self.scale, context, "scale")

        def merge(matrices: Mapping[str, Tensor], start: int) -> Tensor:
            vlm, donor = task_vectors(matrices).values()
            if density < 1:
                selected = selection(vlm, donor, density)
                vlm.mul_(selected)
                donor.mul_(selected)
            energy = float(vlm.double().square().sum()), float(donor.double().square().sum())
            total = sum(energy)
            weights = (energy[0] / total, energy[1] / total) if total > 0 else (0.5, 0.5)
            merged = merge_signs(vlm, donor, weights, "unweighted", "weighted_mean")
            return merged.mul_(scale).add_(matrices["vlm_base"])

        return per_matrix(merge, tensors)


def selection(vlm: Tensor, donor: Tensor, density: float) -> Tensor:
    """Which entries have the largest variance over both, bool in their shape; that of two numbers is (a − b)²/4."""
    variance = (vlm - donor).abs()
    count = int(density * int(variance.count_nonzero()))
    if count == 0:
        return variance < 0
    return variance >= variance.flatten().kthvalue(variance.numel() - count + 1).values
