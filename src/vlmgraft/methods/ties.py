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
- election: `unweighted` in the paper, PEFT and the released BR2V code; mergekit elects on Σ w_t·τ_t (`weighted`).
- where the sum is zero, no sign is elected and nothing is added, as the formula has it; PEFT and mergekit elect "+",
  the paper's code the sign that most entries have.
- combine: the paper has no weights. `mean` divides the weighted sum by the number that agree (PEFT), `weighted_mean` by
  their weights (mergekit with `normalize`), `sum` by nothing (mergekit without).

The released BR2V run has weights 1.6 and 0.2 and density 0.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import DEFAULT_MODULES, Number, Pair, TensorContext, check_range, number_for
from vlmgraft.methods.scratch import scratch

if TYPE_CHECKING:
    from torch import Tensor

    from vlmgraft.methods.base import Passes

Election = Literal["unweighted", "weighted"]
Combine = Literal["mean", "weighted_mean", "sum"]


@dataclass(frozen=True)
class Ties:
    """Trim, elect, merge. A density that is a list or a map needs `trim: tensor`: one threshold has one share."""

    name: ClassVar[str] = "ties"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base", "vlm_base"})
    default_modules: ClassVar[tuple[str, ...]] = DEFAULT_MODULES
    granularity: ClassVar[Literal["element", "tensor"]] = "element"
    passes: ClassVar[int] = 1

    density: Number = 0.2
    """Share of the entries of each task vector that is kept, above 0 to 1."""
    weights: Pair = (1.0, 1.0)
    """[VLM, donor]: factors on the two task vectors."""
    scale: Number = 1.0
    """λ, a factor on the merged task vector."""
    trim: Literal["global", "tensor"] = "global"
    """One threshold over all merged tensors, or one per tensor."""
    election: Election = "unweighted"
    """Signs by the sum of the trimmed task vectors, or of the weighted ones."""
    combine: Combine = "mean"
    """What the weighted sum is divided by: the number that agree, their weights, nothing."""

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, above=True)
        check_range(self, "weights", -float("inf"))
        check_range(self, "scale", -float("inf"))
        if self.trim == "global" and isinstance(self.density, list | dict):
            raise RecipeError(
                f"method.density: {self.density} for one threshold over all tensors; write one number, or trim: tensor"
            )

    def prepare(self, passes: Passes) -> TrimmedTies:
        """Find the exact thresholds in one pass after a sample; the method that merges with them."""
        from vlmgraft.methods.trim import find_thresholds

        def density(context: TensorContext) -> float:
            return number_for(self.density, context, "density")

        return TrimmedTies(self, find_thresholds(passes, task_vectors, self.unit, density))

    def unit(self, context: TensorContext) -> str:
        """What shares a threshold with this tensor."""
        return "" if self.trim == "global" else context.name


@dataclass(frozen=True)
class TrimmedTies:
    """TIES with its thresholds: {unit: {"vlm" or "donor": smallest magnitude that is kept}}."""

    name: ClassVar[str] = Ties.name
    needs: ClassVar[frozenset[str]] = Ties.needs
    default_modules: ClassVar[tuple[str, ...]] = Ties.default_modules
    granularity: ClassVar[Literal["element", "tensor"]] = "element"

    recipe: Ties
    thresholds: Mapping[str, Mapping[str, float]]

    def combine(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm_base + λ·(the merged task vector)."""
        recipe, least = self.recipe, self.thresholds[self.recipe.unit(context)]
        own, donor = (trim_below(tau, least[key]) for key, tau in task_vectors(tensors).items())
        merged = merge_signs(own, donor, weights_for(recipe.weights, context), recipe.election, recipe.combine)
        return merged.mul_(number_for(recipe.scale, context, "scale")).add_(tensors["vlm_base"])


def task_vectors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{"vlm": vlm − vlm_base, "donor": donor − donor_base} in memory by `scratch`."""
    import torch

    own, donor = scratch(tensors["vlm"], "own", "donor")
    return {
        "vlm": torch.sub(tensors["vlm"], tensors["vlm_base"], out=own),
        "donor": torch.sub(tensors["donor"], tensors["donor_base"], out=donor),
    }


def weights_for(weights: Pair, context: TensorContext) -> tuple[float, float]:
    """The weights of the VLM and the donor that hold for one tensor."""
    return number_for(weights[0], context, "weights[0]"), number_for(weights[1], context, "weights[1]")


def trim_below(tau: Tensor, least: float) -> Tensor:
    """τ where |τ| ≥ least, else 0, in place; a float32 threshold."""
    import torch

    if least <= 0:
        return tau
    under = torch.nextafter(torch.tensor(least), torch.tensor(0.0))  # hardshrink keeps what is above its bound
    return torch.ops.aten.hardshrink.out(tau, float(under), out=tau)


def merge_signs(
    own: Tensor, donor: Tensor, weights: tuple[float, float], election: Election, combine: Combine
) -> Tensor:
    """Elect a sign per entry and merge the entries that have it; float32 in any one shape.

    Uses up `own` and `donor`, one of which is the result. All steps are float arithmetic: in torch, booleans cost five
    times as much.
    """
    import torch

    vote, count, other = scratch(own, "vote", "count", "other")
    if election == "weighted":
        torch.mul(own, weights[0], out=vote).add_(donor, alpha=weights[1])
    else:
        torch.add(own, donor, out=vote)
    vote.sign_()
    own.mul_(vote).clamp_(min=0)  # the magnitude where the sign is the elected one, else 0
    donor.mul_(vote).clamp_(min=0)
    if combine != "sum":
        torch.sign(own, out=count)
        torch.sign(donor, out=other)
    total = own.mul_(weights[0]).add_(donor, alpha=weights[1]).mul_(vote)
    if combine == "sum":
        return total
    if combine == "mean":
        return total.div_(count.add_(other).clamp_(min=1))
    divisor = count.mul_(weights[0]).add_(other, alpha=weights[1])
    none = torch.lt(torch.abs(divisor, out=other), 1e-8, out=vote)
    return total.div_(divisor.add_(none))
