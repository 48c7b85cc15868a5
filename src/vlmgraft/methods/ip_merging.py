"""IP-Merging (arXiv 2510.14387): identify the matrices where both models moved alike, project the donor's move, add it.

    τ_vlm = W_vlm − W_vlm_base = U diag(s) Vh,   τ = W_donor − W_base = U' diag(s') Vh'
    identify   similarity = max over i ≤ k of |⟨v_i, v'_i⟩|; matrices below the threshold T stay the VLM's
    rescale    τ' = τ·‖τ_vlm‖/‖τ‖
    project    W = W_vlm + λ·U_k U_kᵀ τ' V_k V_kᵀ      onto the first k singular directions of the VLM's own τ_vlm

The record leaves open how the cosines of a matrix become one number, T and k, and what the unit is. Our choices: the
largest |cos| (a singular vector's sign is arbitrary), T = 0.4, k = 256, each matrix for itself. A script in
circulation that computes something like it takes T = 0.4 and k = 1024, signed cosines, nuclear norms in the
rescaling, and weights directions by a softmax of their cosines. With k of a square matrix's full rank the projection
does nothing. Singular directions are matched by their number: where singular values lie close together, so that their
order is an accident, so is the similarity.

Fused matrices count as one, as they are stored; a stack of experts [experts, out, in] is a matrix per expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import DEFAULT_MODULES, Number, TensorContext, check_matrix, check_range, number_for
from vlmgraft.methods.ties import task_vectors

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class IpMerging:
    """Identify, project, add; a scale of 0 is the VLM bit for bit."""

    name: ClassVar[str] = "ip_merging"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base", "vlm_base"})
    default_modules: ClassVar[tuple[str, ...]] = DEFAULT_MODULES
    granularity: ClassVar[Literal["element", "tensor"]] = "tensor"
    matrices_only: ClassVar[bool] = True

    threshold: Number = 0.4
    """T, the least similarity (|cosine|, 0 to 1) of a matrix that is merged."""
    rank: int = 256
    """k, how many singular directions of the VLM's task vector are projected onto."""
    scale: Number = 1.0
    """λ, a factor on what is added; 0 is the VLM."""

    def __post_init__(self) -> None:
        check_range(self, "threshold", 0, 1)
        check_range(self, "scale", -float("inf"))
        if self.rank < 1:
            raise RecipeError(f"method.rank: {self.rank} must be at least 1")

    def combine(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm + λ·projected donor, of one matrix or a stack; raises NumericalError when one is not finite."""
        import torch

        vlm, taus = tensors["vlm"], task_vectors(tensors)
        check_matrix(context.name, tuple(vlm.shape))
        scale = number_for(self.scale, context, "scale")
        threshold = number_for(self.threshold, context, "threshold")
        if scale == 0:
            return vlm
        own, donor = (tau.reshape(-1, *tau.shape[-2:]) for tau in (taus["vlm"], taus["donor"]))
        updates = [self.update(a, b, threshold, context.name) for a, b in zip(own, donor, strict=True)]
        if all(update is None for update in updates):
            return vlm
        merged = vlm.clone(memory_format=torch.contiguous_format)
        for place, update in zip(merged.view(own.shape), updates, strict=True):
            if update is not None:
                place.add_(update, alpha=scale)
        return merged

    def update(
        self, own: Float[Tensor, "out in"], donor: Float[Tensor, "out in"], threshold: float, name: str
    ) -> Float[Tensor, "out in"] | None:
        """The rescaled and projected task vector of the donor, or None where the two are not alike."""
        from vlmgraft.spectral.svd import decompose_matrix

        norms = own.norm(), donor.norm()
        if not (norms[0] > 0 and norms[1] > 0):
            return None
        mine, theirs = decompose_matrix(own, self.rank, name=name), decompose_matrix(donor, self.rank, name=name)
        if float((mine.Vh * theirs.Vh).sum(1).abs().max()) < threshold:
            return None
        inner = mine.U.mT @ (donor @ mine.Vh.mT)
        return (mine.U @ inner @ mine.Vh).mul_(norms[0] / norms[1])
