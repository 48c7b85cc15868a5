"""TIES merging (arXiv 2306.01708) of the VLM's and the donor's task vectors: trim, elect a sign, merge what agrees.

    τ₁ = W_vlm − W_vlm_base,  τ₂ = W_donor − W_base
    trim     keep the `density` share of each τ_t with the largest magnitudes, zero the rest
    elect    γ = sign(Σ_t τ_t) entry by entry
    merge    τ = mean of w_t·τ_t over the t with sign(τ_t) = γ
    W        = W_vlm_base + λ·τ

Where implementations differ, the paper's behaviour is the default:

- trim: the paper and its code take one threshold per task vector over all parameters (`global`, here over all merged
  tensors); PEFT and mergekit one per tensor (`tensor`). Everything at or above the threshold, the round(density·n)-th
  largest magnitude, is kept, as in the paper's code: equal magnitudes are kept together, so that a little more than the
  share may stay. PEFT and mergekit break such ties by position.
- election: `unweighted` in the paper, PEFT and the released BR2V code; mergekit elects on Σ w_t·τ_t (`weighted`);
  `frequency` is the sign that more of the τ_t have (PEFT's and mergekit's option), whatever their magnitudes.
- where the sum is zero, no sign is elected and nothing is added, as the formula has it; PEFT and mergekit elect "+",
  the paper's code the sign that most entries have. With two models, `frequency` drops every entry in conflict.
- combine: the paper has no weights. `mean` divides the weighted sum by the number that agree (PEFT), `weighted_mean` by
  their weights (mergekit with `normalize`), `sum` by nothing (mergekit without); `max` takes the w_t·τ_t of the largest
  magnitude among those that agree (an option of the paper's code).

`donor_density` trims the donor's task vector to another share than the VLM's (`density`), as mergekit's densities per
model do. The released BR2V run has weights 1.6 and 0.2 and density 0.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import Method, TensorContext
from vlmgraft.methods.task_vectors import SignMethod, task_vectors

if TYPE_CHECKING:
    from torch import Tensor

    from vlmgraft.methods.base import Passes


@dataclass(frozen=True)
class Ties(SignMethod):
    """Trim, elect, merge. A density that is a list or a map needs `trim: tensor`: one threshold has one share."""

    name: ClassVar[str] = "ties"
    passes: ClassVar[int] = 1

    trim: Literal["global", "tensor"] = "global"
    """One threshold over all merged tensors, or one per tensor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("density", "donor_density"):
            density = getattr(self, option)
            if self.trim == "global" and isinstance(density, list | dict):
                raise RecipeError(
                    f"method.{option}: {density} for one threshold over all tensors; write one number, or trim: tensor"
                )

    def prepare(self, passes: Passes) -> TrimmedTies:
        """Find the exact thresholds in one pass after a sample; the method that merges with them."""
        from vlmgraft.methods.trim import find_thresholds

        return TrimmedTies(self, find_thresholds(passes, task_vectors, self.unit, self.density_of))

    def unit(self, context: TensorContext) -> str:
        """What shares a threshold with this tensor."""
        return "" if self.trim == "global" else context.name


@dataclass(frozen=True)
class TrimmedTies(Method):
    """TIES with its thresholds: {unit: {"vlm" or "donor": smallest magnitude that is kept}}."""

    name: ClassVar[str] = Ties.name
    needs: ClassVar[frozenset[str]] = Ties.needs

    recipe: Ties
    thresholds: Mapping[str, Mapping[str, float]]

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm_base + λ·(the merged task vector)."""
        least = self.thresholds[self.recipe.unit(context)]
        vlm, donor = (trimmed(tau, least[source]) for source, tau in task_vectors(tensors).items())
        return self.recipe.merge(vlm, donor, tensors["vlm_base"], context)


def trimmed(tau: Tensor, least: float) -> Tensor:
    """τ where |τ| ≥ least, else 0, in place; a float32 threshold."""
    import torch

    if least <= 0:
        return tau
    under = torch.nextafter(torch.tensor(least), torch.tensor(0.0))  # hardshrink keeps what is above its bound
    return torch.ops.aten.hardshrink.out(tau, float(under), out=tau)
