"""DARE as the trimming of TIES (arXiv 2311.03099): entries are dropped at random, not by size, then a sign is elected.

    W = W_vlm_base + λ·merge(δ(τ_vlm), δ(τ))

δ drops every entry with probability 1 − density and divides what is left by density (see `dare_linear` for where
copies of it differ); `merge` elects and merges as `ties` does, with the same options and defaults. PEFT computes
this; mergekit elects on the weighted sum (`election: weighted`) and divides by nothing (`combine: sum`) unless told
to normalize.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.methods.base import DEFAULT_MODULES, Number, Pair, TensorContext, check_range, number_for
from vlmgraft.methods.dare import drop
from vlmgraft.methods.ties import Combine, Election, merge_signs, task_vectors, weights_for

if TYPE_CHECKING:
    from torch import Tensor

    from vlmgraft.methods.base import Passes


@dataclass(frozen=True)
class DareTies:
    """Drop at random, then elect signs as `ties` does."""

    name: ClassVar[str] = "dare_ties"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base", "vlm_base"})
    default_modules: ClassVar[tuple[str, ...]] = DEFAULT_MODULES
    granularity: ClassVar[Literal["element", "tensor"]] = "element"
    passes: ClassVar[int] = 0

    density: Number = 0.2
    """Share of the entries of each task vector that is kept, above 0 to 1."""
    weights: Pair = (1.0, 1.0)
    """[VLM, donor]: factors on the two task vectors."""
    scale: Number = 1.0
    """λ, a factor on the merged task vector."""
    rescale: bool = True
    """Divide what is kept by the density, as the paper does."""
    seed: int = 0
    """Of the random numbers; one seed gives one result."""
    election: Election = "unweighted"
    """Signs by the sum of the thinned task vectors, or of the weighted ones."""
    combine: Combine = "mean"
    """What the weighted sum is divided by: the number that agree, their weights, nothing."""

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, above=True)
        check_range(self, "weights", -float("inf"))
        check_range(self, "scale", -float("inf"))

    def prepare(self, passes: Passes) -> DroppedTies:
        """The method that merges; no pass is needed."""
        return DroppedTies(self)


@dataclass(frozen=True)
class DroppedTies:
    """The merge of a DareTies recipe (whose option `combine` takes the name that the merge calls)."""

    name: ClassVar[str] = DareTies.name
    needs: ClassVar[frozenset[str]] = DareTies.needs
    default_modules: ClassVar[tuple[str, ...]] = DareTies.default_modules
    granularity: ClassVar[Literal["element", "tensor"]] = "element"

    recipe: DareTies

    def combine(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm_base + λ·(what the dropped task vectors agree on)."""
        recipe = self.recipe
        density = number_for(recipe.density, context, "density")
        weights = weights_for(recipe.weights, context)
        taus = task_vectors(tensors)
        own, donor = (drop(tau, recipe.seed, key, context, density, recipe.rescale) for key, tau in taus.items())
        merged = merge_signs(own, donor, weights, recipe.election, recipe.combine)
        return merged.mul_(number_for(recipe.scale, context, "scale")).add_(tensors["vlm_base"])
