"""IP-Merging (arXiv 2510.14387): find the matrices that changed alike in both models, project the donor's change, add.

    τ_vlm = W_vlm − W_vlm_base = U diag(s) Vh,   τ = W_donor − W_base = U' diag(s') Vh'       first k directions each

The released script and the paper's text are two procedures, whose updates differ in norm by a factor of several.
`variant: released`, the default:

    identify   c_i = ⟨v_i, v'_i⟩ for i ≤ k; matrices with max c_i < T stay the VLM's
    rescale    τ' = τ_k·Σ_{i≤k} s_i / Σ_{i≤k} s'_i                τ_k: the first k directions of τ; nuclear norms
    project    W = W_vlm + λ·τ' Σ_i p_i² v_i v_iᵀ                 p = softmax(32·c); the input side alone

`variant: paper`:

    identify   matrices with max |c_i| < T stay the VLM's
    rescale    τ' = τ·‖τ_vlm‖/‖τ‖                                 Frobenius norms
    project    W = W_vlm + λ·U_k U_kᵀ τ' V_k V_kᵀ                 output and input side; nothing for k = full rank

T = 0.4 in both. k is 1,024 in the script; the text gives none, and 256 is our choice, as is the largest |c_i| as a
matrix's similarity. Each matrix is treated by itself. The script's c_i have the arbitrary signs of a randomised SVD.
Here signs are chosen so that ⟨u_i, u'_i⟩ ≥ 0: c_i > 0 then means that both sides agree, and the result does not
depend on the SVD. The script uses one base for both models, we use two. Singular directions are matched by index:
where singular values are so close that their order is arbitrary, the similarity is arbitrary too.

Fused matrices count as one matrix, as stored; a stack of experts [experts, out, in] is one matrix per expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import Method, Number, TensorContext, check_range, number_for
from vlmgraft.methods.task_vectors import task_vectors
from vlmgraft.spectral.rank import check_matrix

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from vlmgraft.spectral.svd import SVD

RANKS = {"released": 1024, "paper": 256}
SHARPNESS = 32.0
"""Factor on the cosines in the released script's softmax."""


@dataclass(frozen=True)
class IpMerging(Method):
    """Identify, rescale, project, add; a scale of 0 is the VLM bit for bit."""

    name: ClassVar[str] = "ip_merging"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base", "vlm_base"})
    whole_tensors: ClassVar[bool] = True
    matrices_only: ClassVar[bool] = True

    threshold: Number = 0.4
    """T, the least similarity (cosine, 0 to 1) of a matrix that is merged."""
    rank: int | None = None
    """k, how many singular directions are compared and projected onto; default 1024 (released) or 256 (paper)."""
    scale: Number = 1.0
    """λ, a factor on what is added; 0 is the VLM."""
    variant: Literal["released", "paper"] = "released"
    """The authors' script, or the text of their paper."""

    def __post_init__(self) -> None:
        check_range(self, "threshold", low=0, high=1)
        check_range(self, "scale")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"method.rank: {self.rank} must be at least 1")

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm + λ·projected donor, of one matrix or a stack; raises NumericalError when one is not finite."""
        import torch

        vlm, taus = tensors["vlm"], task_vectors(tensors)
        check_matrix(context.name, vlm.shape)
        scale = number_for(self.scale, context, "scale")
        threshold = number_for(self.threshold, context, "threshold")
        if scale == 0:
            return vlm
        receiver, donor = (tau.reshape(-1, *tau.shape[-2:]) for tau in (taus["vlm"], taus["donor"]))
        updates = [self.update(a, b, threshold, context.name) for a, b in zip(receiver, donor, strict=True)]
        if all(update is None for update in updates):
            return vlm
        merged = vlm.clone(memory_format=torch.contiguous_format)
        for matrix, update in zip(merged.view(receiver.shape), updates, strict=True):
            if update is not None:
                matrix.add_(update, alpha=scale)
        return merged

    def update(
        self, receiver: Float[Tensor, "out in"], donor: Float[Tensor, "out in"], threshold: float, name: str
    ) -> Float[Tensor, "out in"] | None:
        """The rescaled and projected task vector of the donor, or None where the two task vectors are not similar."""
        from vlmgraft.spectral.svd import decompose_matrix

        if not (receiver.any() and donor.any()):
            return None
        rank = RANKS[self.variant] if self.rank is None else self.rank
        vlm_svd, donor_svd = (decompose_matrix(tau, rank, name=name) for tau in (receiver, donor))
        if self.variant == "paper":
            return _paper_update(vlm_svd, donor_svd, donor, receiver.norm() / donor.norm(), threshold)
        return _released_update(vlm_svd, donor_svd, threshold)


def _released_update(vlm: SVD, donor: SVD, threshold: float) -> Tensor | None:
    """τ_k·Σs/Σs' Σ_i p_i² v_i v_iᵀ with p = softmax(32·c), or None where every c_i is below the threshold."""
    import torch

    flip = torch.where((vlm.U * donor.U).sum(0) < 0, -1.0, 1.0)
    cosines = (vlm.Vh * donor.Vh).sum(1) * flip
    if float(cosines.max()) < threshold:
        return None
    weights = (SHARPNESS * cosines).softmax(0).square()
    inner = (donor.Vh @ vlm.Vh.mT) * donor.s[:, None] * weights
    return (donor.U @ inner @ vlm.Vh).mul_(vlm.s.sum() / donor.s.sum())


def _paper_update(vlm: SVD, donor: SVD, tau: Tensor, ratio: Tensor, threshold: float) -> Tensor | None:
    """U_k U_kᵀ τ V_k V_kᵀ times ‖τ_vlm‖/‖τ‖, or None where every |c_i| is below the threshold."""
    if float((vlm.Vh * donor.Vh).sum(1).abs().max()) < threshold:
        return None
    inner = vlm.U.mT @ (tau @ vlm.Vh.mT)
    return (vlm.U @ inner @ vlm.Vh).mul_(ratio)
