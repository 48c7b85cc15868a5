"""FRANK (arXiv 2505.16151): two task vectors, weighted layer by layer by their norms and the VLM's visual attention.

    W   = W_vlm_base + λ_V·τ_vlm + λ_R·τ           τ_vlm = W_vlm − W_vlm_base,  τ = W_donor − W_base
    λ_t = w_t‖τ_t‖² / (w_V‖τ_vlm‖² + w_R‖τ‖²)      norms over one decoder layer,  λ_V + λ_R = 1,  w_R = 1 − w_V

w_V of layer l is an exponential exp(−b·l). b is given as `decay`, or fitted as in the paper's equation 16 to the share
a_l of attention that text tokens give to visual tokens in each layer (`visual_attention`, which `vlmgraft attention VLM
--data FILE` measures): minus the slope of the linear regression of log a_l on l.

How w_V is normalised over layers (`prior`):

- `literal`: as written in the paper, over layers: Σ_l w_V = 1. With 28 layers w_V is about 1/28, so that the donor has
  nearly all the weight in every layer.
- `max_rescaled`, the default: the largest w_V is 1, so that one layer, the first if attention falls, stays the
  VLM's. Our choice.
- `none`: w_V = ½ everywhere, only the norms decide.

Tensors outside the layers, which have no share of attention, form one more unit with w_V = ½: our choice too.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import Method, TensorContext
from vlmgraft.methods.task_vectors import task_vectors

if TYPE_CHECKING:
    from torch import Tensor

    from vlmgraft.alignment import Alignment
    from vlmgraft.methods.base import Passes


@dataclass(frozen=True)
class Frank(Method):
    """Two task vectors, weighted layer by layer."""

    name: ClassVar[str] = "frank"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base", "vlm_base"})
    passes: ClassVar[int] = 1

    prior: Literal["max_rescaled", "literal", "none"] = "max_rescaled"
    """How w_V, the weight of vision, is normalised over layers; none: ½ everywhere."""
    decay: Literal["fitted"] | float = "fitted"
    """b of w_V = c·exp(−b·layer), or fitted to visual_attention."""
    visual_attention: list[float] | None = None
    """Share of attention that text gives to visual tokens, 0 to 1, one per decoder layer."""

    def __post_init__(self) -> None:
        shares = self.visual_attention
        if self.prior != "none" and self.decay == "fitted" and shares is None:
            raise RecipeError(
                "method.visual_attention: missing; give the share of attention on visual tokens per layer (`vlmgraft "
                "attention VLM --data FILE` measures it), or a number as method.decay, or prior: none"
            )
        if shares is not None and (self.decay != "fitted" or self.prior == "none"):
            raise RecipeError("method.visual_attention: not used with a number as decay or prior: none; remove one")
        if shares is not None and (len(shares) < 2 or not all(0 <= share <= 1 for share in shares) or not any(shares)):
            raise RecipeError(f"method.visual_attention: {shares} must be two or more shares from 0 to 1, not all 0")
        if shares is not None and not all(shares):
            raise RecipeError(
                f"method.visual_attention: layer {shares.index(0)} has share 0, which has no logarithm; measure on "
                "more samples, or give decay"
            )
        if self.decay != "fitted" and not math.isfinite(self.decay):
            raise RecipeError(f"method.decay: {self.decay} must be a finite number or `fitted`")

    def check(self, alignment: Alignment) -> None:
        """Refuse a list that does not have one share per layer."""
        if self.visual_attention is not None and len(self.visual_attention) != alignment.layers:
            raise RecipeError(
                f"method.visual_attention: {len(self.visual_attention)} shares for {alignment.layers} layers; "
                "give one per decoder layer"
            )

    def visual_prior(self, layers: int) -> tuple[float, ...]:
        """w_V of every decoder layer."""
        if self.prior == "none":
            return (0.5,) * layers
        decay = fit_decay(self.visual_attention or ()) if self.decay == "fitted" else self.decay
        weights = _curve(decay, layers)
        total = sum(weights) if self.prior == "literal" else max(weights)
        return tuple(weight / total for weight in weights)

    def prepare(self, passes: Passes) -> WeighedFrank:
        """Sum the squares of both task vectors per layer in one pass; returns the method with the resulting λ."""
        import torch

        def squares(pieces: Mapping[str, Tensor], context: TensorContext) -> tuple[float, ...]:
            return tuple(float(tau.norm(dtype=torch.float64)) ** 2 for tau in task_vectors(pieces).values())

        vlm: dict[int | None, float] = defaultdict(float)
        donor: dict[int | None, float] = defaultdict(float)
        layers = 0
        for context, (vlm_square, donor_square) in passes.map(squares):
            vlm[context.layer] += vlm_square
            donor[context.layer] += donor_square
            layers = context.layers
        prior = self.visual_prior(layers)
        return WeighedFrank(
            tuple(_weigh(layer, 0.5 if layer is None else prior[layer], vlm[layer], donor[layer]) for layer in vlm)
        )


@dataclass(frozen=True)
class LayerWeights:
    """One layer (None: outside the layers): w_V, λ_V, λ_R, ‖τ_vlm‖, ‖τ‖."""

    layer: int | None
    visual_prior: float
    vlm: float
    donor: float
    vlm_norm: float
    donor_norm: float


@dataclass(frozen=True)
class WeighedFrank(Method):
    """FRANK with its weights, in the order of the layers on disk."""

    name: ClassVar[str] = Frank.name
    needs: ClassVar[frozenset[str]] = Frank.needs

    layers: tuple[LayerWeights, ...]

    def notes(self) -> tuple[str, ...]:
        """λ per layer in words, for the receipt and the terminal."""
        return tuple(
            f"frank, {'outside the layers' if weights.layer is None else f'layer {weights.layer}'}: "
            f"λ_V {weights.vlm:.4f}, λ_R {weights.donor:.4f} (w_V {weights.visual_prior:.4f}, "
            f"‖τ_vlm‖ {weights.vlm_norm:.4g}, ‖τ‖ {weights.donor_norm:.4g})"
            for weights in self.layers
        )

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm_base + λ_V·τ_vlm + λ_R·τ; the VLM's piece itself where λ_R is zero."""
        weights = next(weights for weights in self.layers if weights.layer == context.layer)
        if weights.donor == 0:
            return tensors["vlm"]
        taus = task_vectors(tensors)
        return tensors["vlm_base"].add(taus["vlm"], alpha=weights.vlm).add_(taus["donor"], alpha=weights.donor)


def fit_decay(shares: Sequence[float]) -> float:
    """b of equation 16: minus the slope of the linear regression of log a_l on l = 0, 1, …; shares above 0."""
    return -statistics.linear_regression(range(len(shares)), [math.log(share) for share in shares]).slope


def _curve(decay: float, layers: int) -> list[float]:
    """exp(−decay·l) of every layer, scaled so that the largest is 1."""
    first = 0 if decay >= 0 else layers - 1
    return [math.exp(-decay * (layer - first)) for layer in range(layers)]


def _weigh(layer: int | None, prior: float, vlm_square: float, donor_square: float) -> LayerWeights:
    """λ of one layer from ‖τ_vlm‖² and ‖τ‖²; λ_V = 1 if both terms are zero."""
    vlm, donor = prior * vlm_square, (1 - prior) * donor_square
    share = vlm / (vlm + donor) if vlm + donor > 0 else 1.0
    return LayerWeights(layer, prior, share, 1 - share, math.sqrt(vlm_square), math.sqrt(donor_square))
