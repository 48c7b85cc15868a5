"""Model Stock (arXiv 2403.19522): the mean of two fine-tuned models, pulled to the base by the angle between them.

    W = t·(W₁ + W₂)/2 + (1 − t)·W_base,   t = 2 cos θ / (1 + cos θ)

θ is the angle between the task vectors of the VLM and the donor in one tensor (`filter_wise`: in one row). The paper
assumes one base; with two bases, W = W_vlm_base + t·(τ_vlm + τ)/2. Orthogonal task vectors, and a tensor that one of
the two models left unchanged, give t = 0, the VLM's base, as in mergekit: no option makes this the VLM. At an obtuse
angle t is negative; opposite task vectors, for which t is undefined, give t = 0, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlmgraft.methods.base import Method, TensorContext
from vlmgraft.methods.task_vectors import per_matrix, task_vectors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelStock(Method):
    """The mean of both models, pulled to the base by the angle between them, per tensor or per row."""

    name: ClassVar[str] = "model_stock"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base", "vlm_base"})
    whole_tensors: ClassVar[bool] = True

    filter_wise: bool = False
    """One angle for every row of a matrix, instead of one for every tensor."""

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm_base + t·(τ_vlm + τ)/2, matrix by matrix."""

        def merge(matrices: Mapping[str, Tensor], start: int) -> Tensor:
            vlm, donor = task_vectors(matrices).values()
            cosine = angle_cosine(vlm, donor, self.filter_wise)
            half = (cosine / (1 + cosine)).where(cosine > -1, 0.0)
            return vlm.add_(donor).mul_(half.float()).add_(matrices["vlm_base"])

        return per_matrix(merge, tensors)


def angle_cosine(vlm: Tensor, donor: Tensor, rows: bool) -> Tensor:
    """cos θ in float64, of the tensors [1] or of every row [out, 1]; 0 where one of them is zero."""
    shape = (-1, vlm.shape[-1]) if rows else (1, -1)
    a, b = (tau.reshape(shape).double() for tau in (vlm, donor))
    norms = a.norm(dim=1) * b.norm(dim=1)
    cosine = (a * b).sum(1) / norms.where(norms > 0, 1.0)
    return cosine.clamp(-1, 1).reshape(*(vlm.shape[:-1] if rows else ()), 1)
