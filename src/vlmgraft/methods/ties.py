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

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import Fused, Method, TensorContext, number_for
from vlmgraft.methods.task_vectors import SignMethod, task_vectors

if TYPE_CHECKING:
    from torch import Tensor

    from vlmgraft.methods.base import Passes
    from vlmgraft.methods.trim import Tally

SOURCES = ("vlm", "donor")


@dataclass(frozen=True)
class Ties(SignMethod):
    """Trim, elect, merge. A density that is a list or a map needs `trim: tensor`: a global threshold has one density.

    A global threshold is guessed where a sample determines it uniquely, as with bfloat16 weights. The merge then counts
    the trimmed entries; if the guess was wrong, the merge is repeated after a pass over all weights.
    """

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
        """The method that merges with the exact thresholds, or with guesses that it verifies."""
        from vlmgraft.methods.trim import find_thresholds

        guess = passes.may_guess and self.trim == "global"
        found = find_thresholds(passes, task_vectors, self.unit, self.density_of, guess=guess)
        return TrimmedTies(self, found, {} if guess else None)

    def unit(self, context: TensorContext) -> str:
        """Key of the threshold for this tensor: tensors with equal keys share one."""
        return "" if self.trim == "global" else context.name


@dataclass(frozen=True)
class TrimmedTies(Method):
    """TIES with its thresholds: {unit: {"vlm" or "donor": smallest magnitude that is kept}}."""

    name: ClassVar[str] = Ties.name
    needs: ClassVar[frozenset[str]] = Ties.needs

    recipe: Ties
    thresholds: Mapping[str, Mapping[str, float]]
    counted: dict[tuple[str, int], dict[str, Tally]] | None = field(default=None, compare=False, repr=False)
    """Tallies by tensor and first element, if the thresholds are guesses."""

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm_base + λ·(the merged task vector)."""
        least = self.thresholds[self.recipe.unit(context)]
        vectors = {source: trimmed(tau, least[source]) for source, tau in task_vectors(tensors).items()}
        if self.counted is not None:
            from vlmgraft.methods.trim import Tally

            tallies = {source: Tally.of(tau, least[source]) for source, tau in vectors.items()}
            self.counted[context.name, context.start] = tallies
        return self.recipe.merge(vectors["vlm"], vectors["donor"], tensors["vlm_base"], context)

    def fused(self, context: TensorContext) -> Fused | None:
        """`apply` as a form of the compiled pass; only with the paper's election and mean."""
        recipe, least = self.recipe, self.thresholds[self.recipe.unit(context)]
        if recipe.election != "unweighted" or recipe.combine != "mean":
            return None
        weights = [number_for(weight, context, f"weights[{number}]") for number, weight in enumerate(recipe.weights)]
        numbers = (least["vlm"], least["donor"], *weights, number_for(recipe.scale, context, "scale"))
        return Fused("ties", numbers, None if self.counted is None else partial(self._count, context))

    def _count(self, context: TensorContext, elements: int, vlm: tuple[int, int], donor: tuple[int, int]) -> None:
        from vlmgraft.methods.trim import Tally

        assert self.counted is not None
        self.counted[context.name, context.start] = {"vlm": Tally(*vlm, elements), "donor": Tally(*donor, elements)}

    @property
    def guessed(self) -> bool:
        """Whether the thresholds are guesses."""
        return self.counted is not None

    def tally(self, name: str) -> dict[str, list[int]] | None:
        """Counts per source over a tensor: magnitudes above the threshold, at or above it, and all."""
        if self.counted is None:
            return None
        parts = [self.counted.pop(key) for key in [*self.counted] if key[0] == name]
        return {source: [*map(sum, zip(*(astuple(part[source]) for part in parts), strict=True))] for source in SOURCES}

    def bears_out(self, tallies: Sequence[Any]) -> bool:
        """Whether a pass over all weights would have found the same thresholds."""
        from vlmgraft.methods.trim import Tally

        everywhere = TensorContext("", (), 0)
        return all(tallies) and all(
            sum((Tally(*row[source]) for row in tallies), Tally()).bears_out(self.recipe.density_of(source, everywhere))
            for source in SOURCES
        )


def trimmed(tau: Tensor, least: float) -> Tensor:
    """τ where |τ| ≥ least, else 0, in place; a float32 threshold."""
    import torch

    if least <= 0:
        return tau
    under = torch.nextafter(torch.tensor(least), torch.tensor(0.0))  # hardshrink keeps what is above its bound
    return torch.ops.aten.hardshrink.out(tau, float(under), out=tau)
