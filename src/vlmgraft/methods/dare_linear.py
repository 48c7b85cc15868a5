"""DARE with a weighted sum (arXiv 2311.03099): W = W_vlm_base + λ·(w₁·δ(τ_vlm) + w₂·δ(τ)).

τ_vlm = W_vlm − W_vlm_base, τ = W_donor − W_base; δ drops every entry with probability 1 − density and divides what is
left by density. Where implementations differ:

- a copy of the BR2V code that circulates computes the division and drops the result: `rescale: false` reproduces it.
- mergekit keeps the L1 norm of what it rescales in some versions; the paper and PEFT divide by density.
- the paper draws one mask per run; here a mask is a function of seed, tensor and entry (`methods/dare.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.methods.base import DEFAULT_MODULES, Number, Pair, TensorContext, check_range, number_for
from vlmgraft.methods.dare import drop
from vlmgraft.methods.ties import task_vectors, weights_for

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DareLinear:
    """Drop at random, add."""

    name: ClassVar[str] = "dare_linear"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base", "vlm_base"})
    default_modules: ClassVar[tuple[str, ...]] = DEFAULT_MODULES
    granularity: ClassVar[Literal["element", "tensor"]] = "element"

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

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, above=True)
        check_range(self, "weights", -float("inf"))
        check_range(self, "scale", -float("inf"))

    def combine(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm_base + λ·(weighted sum of the dropped task vectors)."""
        density = number_for(self.density, context, "density")
        weights = weights_for(self.weights, context)
        scale = number_for(self.scale, context, "scale")
        taus = task_vectors(tensors)
        own, donor = (drop(tau, self.seed, key, context, density, self.rescale) for key, tau in taus.items())
        return own.mul_(weights[0]).add_(donor, alpha=weights[1]).mul_(scale).add_(tensors["vlm_base"])
