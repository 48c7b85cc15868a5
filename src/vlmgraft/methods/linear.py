"""Weighted means of VLM and donor (BR2V, arXiv 2505.05464), everywhere or with some layers kept.

    linear       W = a·W_vlm + (w − a)·W_donor          w = weight_sum, 1 by default; released runs a = 0.9
    layer_swap   W = W_vlm in keep_layers, the mean of `linear` everywhere else

With w = 1 it is computed as W_donor + a·(W_vlm − W_donor) in float32 by `torch.lerp`; a = 1 is the VLM bit for bit.
PlaM (arXiv 2601.07645) moves the attention of late layers towards the VLM's text base with weights that do not add up
to one, 0.9·W_vlm + 0.2·W_base: that is the base as `donor`, `modules: [attention]`, `layers:` the late ones,
`vlm_weight: 0.9` and `weight_sum: 1.1`.

The released run of layer_swap keeps layers 0 to 5 (k = 5) with a = 0.9. A tensor outside the layers (final norm, say)
is in no kept layer and is averaged. Another method of this name (arXiv 2410.01335) replaces whole layers by those of
the other model: that is `vlm_weight: 0` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from vlmgraft.alignment.select import select_layers
from vlmgraft.errors import AlignmentError, RecipeError
from vlmgraft.methods.base import Fused, Method, Number, TensorContext, check_range, number_for
from vlmgraft.methods.scratch import scratch

if TYPE_CHECKING:
    from torch import Tensor

    from vlmgraft.alignment import Alignment

ANY_DEPTH = 1 << 20


@dataclass(frozen=True)
class Linear(Method):
    """A weighted mean of every tensor of the language model except embeddings and head; needs no base."""

    name: ClassVar[str] = "linear"
    default_modules: ClassVar[tuple[str, ...]] = ("all",)

    vlm_weight: Number = 0.9
    """a, the VLM's share of the mean, 0 to 1."""
    weight_sum: Number = 1.0
    """w, what both weights add up to; 1 is a mean."""

    def __post_init__(self) -> None:
        check_range(self, "vlm_weight", "weight_sum")

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """a·vlm + (w − a)·donor."""
        weight = number_for(self.vlm_weight, context, "vlm_weight")
        total = number_for(self.weight_sum, context, "weight_sum")
        if weight == total == 1:
            return tensors["vlm"]
        import torch

        (merged,) = scratch(tensors["vlm"], "merged")
        if total != 1:
            return torch.mul(tensors["vlm"], weight, out=merged).add_(tensors["donor"], alpha=total - weight)
        return torch.lerp(tensors["donor"], tensors["vlm"], weight, out=merged)

    def fused(self, context: TensorContext) -> Fused | None:
        """`apply` as a form of the compiled pass."""
        weight = number_for(self.vlm_weight, context, "vlm_weight")
        total = number_for(self.weight_sum, context, "weight_sum")
        if weight == total == 1:
            return None
        return Fused("lerp", (weight,)) if total == 1 else Fused("sum", (weight, total - weight))


@dataclass(frozen=True)
class LayerSwap(Method):
    """Some layers are the VLM's, the others a mean; needs no base."""

    name: ClassVar[str] = "layer_swap"
    default_modules: ClassVar[tuple[str, ...]] = ("all",)

    vlm_weight: Number = 0.9
    """a, the VLM's share of the mean in the other layers, 0 to 1."""
    keep_layers: int | list[int] | str = "0-5"
    """Layers that stay the VLM's, counted from 0: "0-5", "0-5,20-27", one layer or a list."""

    def __post_init__(self) -> None:
        check_range(self, "vlm_weight")
        self.kept  # noqa: B018  (parses the range, to refuse an invalid one)

    @cached_property
    def kept(self) -> frozenset[int]:
        """The layers that stay the VLM's."""
        try:
            return select_layers(self.keep_layers if self.keep_layers != "all" else "", ANY_DEPTH)
        except AlignmentError:
            raise RecipeError(
                f"method.keep_layers: {self.keep_layers!r} is not a range such as 0-5, a layer or a list of layers"
            ) from None

    def check(self, alignment: Alignment) -> None:
        """Refuse layers that the model does not have, and keeping all of them."""
        last = alignment.layers - 1
        if max(self.kept) > last:
            raise RecipeError(f"method.keep_layers: {max(self.kept)} is beyond the last layer, {last} (counted from 0)")
        if all(tensor.layer in self.kept for tensor in alignment.merged):
            raise RecipeError(
                f"method.keep_layers: {self.keep_layers!r} keeps every layer that is merged; nothing is left"
            )

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """The VLM's piece in a kept layer, else a·vlm + (1 − a)·donor."""
        if context.layer in self.kept:
            return tensors["vlm"]
        return Linear(self.vlm_weight).apply(tensors, context)

    def fused(self, context: TensorContext) -> Fused | None:
        """`apply` as a form of the compiled pass."""
        return None if context.layer in self.kept else Linear(self.vlm_weight).fused(context)
