"""FRANK (arXiv 2505.16151): the two task vectors weighted layer by layer, by their size and by where the VLM looks.

    W   = W_vlm_base + λ_V·τ_vlm + λ_R·τ           τ_vlm = W_vlm − W_vlm_base,  τ = W_donor − W_base
    λ_t = w_t‖τ_t‖² / (w_V‖τ_vlm‖² + w_R‖τ‖²)      norms over one decoder layer,  λ_V + λ_R = 1,  w_R = 1 − w_V

w_V of layer l is an exponential c·exp(−b·l), fitted by least squares to the share of attention that text tokens give to
visual tokens in each layer (`visual_attention`, which `vlmgraft attention VLM --data FILE` measures; or b itself as
`decay`). How it is normalised:

- `literal`: as the paper words it, over layers: Σ_l w_V = 1. With 28 layers w_V is about 1/28, so that the donor takes
  nearly all of every layer.
- `max_rescaled`, the default: the largest w_V is 1, so that one layer, the first when attention falls, stays the
  VLM's. Our choice.
- `none`: w_V = ½ everywhere, the norms alone decide.

The fit is of the shares themselves, not of their logarithms. Tensors outside the layers, which have no share of
attention, form one more unit with w_V = ½: our choice too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import DEFAULT_MODULES, TensorContext
from vlmgraft.methods.ties import task_vectors

if TYPE_CHECKING:
    from torch import Tensor

    from vlmgraft.alignment import Alignment
    from vlmgraft.methods.base import Passes


@dataclass(frozen=True)
class Frank:
    """Two task vectors, weighted layer by layer."""

    name: ClassVar[str] = "frank"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base", "vlm_base"})
    default_modules: ClassVar[tuple[str, ...]] = DEFAULT_MODULES
    granularity: ClassVar[Literal["element", "tensor"]] = "element"
    passes: ClassVar[int] = 1

    prior: Literal["max_rescaled", "literal", "none"] = "max_rescaled"
    """How w_V, the weight of sight, is normalised over layers; none: ½ everywhere."""
    decay: Literal["fitted"] | float = "fitted"
    """b of w_V = c·exp(−b·layer), or fitted to visual_attention."""
    visual_attention: list[float] | None = None
    """Share of the attention of text on visual tokens, 0 to 1, one per decoder layer."""

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
        """Sum both task vectors' squares per layer in one pass; the method that merges with the λ that follow."""
        import torch

        def squares(pieces: Mapping[str, Tensor], context: TensorContext) -> tuple[float, float]:
            own, donor = (float(tau.norm(dtype=torch.float64)) for tau in task_vectors(pieces).values())
            return own**2, donor**2

        own: dict[int | None, float] = {}
        donor: dict[int | None, float] = {}
        layers = 0
        for context, (mine, theirs) in passes.map(squares):
            own[context.layer] = own.get(context.layer, 0.0) + mine
            donor[context.layer] = donor.get(context.layer, 0.0) + theirs
            layers = context.layers
        prior = self.visual_prior(layers)
        return WeighedFrank(
            tuple(_weigh(unit, 0.5 if unit is None else prior[unit], own[unit], donor[unit]) for unit in own)
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
class WeighedFrank:
    """FRANK with its weights, in the order of the layers on disk."""

    name: ClassVar[str] = Frank.name
    needs: ClassVar[frozenset[str]] = Frank.needs
    default_modules: ClassVar[tuple[str, ...]] = Frank.default_modules
    granularity: ClassVar[Literal["element", "tensor"]] = "element"

    layers: tuple[LayerWeights, ...]

    def notes(self) -> tuple[str, ...]:
        """λ per layer in words, for the receipt and the terminal."""
        return tuple(
            f"frank, {'outside the layers' if one.layer is None else f'layer {one.layer}'}: "
            f"λ_V {one.vlm:.4f}, λ_R {one.donor:.4f} (w_V {one.visual_prior:.4f}, ‖τ_vlm‖ {one.vlm_norm:.4g}, "
            f"‖τ‖ {one.donor_norm:.4g})"
            for one in self.layers
        )

    def combine(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """vlm_base + λ_V·τ_vlm + λ_R·τ; the VLM's piece itself where λ_R is zero."""
        weights = next(one for one in self.layers if one.layer == context.layer)
        if weights.donor == 0:
            return tensors["vlm"]
        taus = task_vectors(tensors)
        return tensors["vlm_base"].add(taus["vlm"], alpha=weights.vlm).add_(taus["donor"], alpha=weights.donor)


def fit_decay(shares: Sequence[float]) -> float:
    """b of the least-squares fit c·exp(−b·l) to shares of layers l = 0, 1, …; |b| at most 5.

    c follows from b in closed form; the remaining error in b is searched on a grid and refined by golden sections.
    """

    def error(decay: float) -> float:
        curve = _curve(decay, len(shares))
        factor = sum(a * e for a, e in zip(shares, curve, strict=True)) / sum(e * e for e in curve)
        return sum((a - factor * e) ** 2 for a, e in zip(shares, curve, strict=True))

    step = 0.01
    best = min((step * place for place in range(-500, 501)), key=error)
    low, high, golden = best - step, best + step, (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return (low + high) / 2


def _curve(decay: float, layers: int) -> list[float]:
    """exp(−decay·l) of every layer, scaled so that the largest is 1."""
    first = 0 if decay >= 0 else layers - 1
    return [math.exp(-decay * (layer - first)) for layer in range(layers)]


def _weigh(layer: int | None, prior: float, own: float, donor: float) -> LayerWeights:
    """λ of one layer from ‖τ_vlm‖² and ‖τ‖²; the VLM's alone where both terms are zero."""
    mine, theirs = prior * own, (1 - prior) * donor
    share = mine / (mine + theirs) if mine + theirs > 0 else 1.0
    return LayerWeights(layer, prior, share, 1 - share, math.sqrt(own), math.sqrt(donor))
