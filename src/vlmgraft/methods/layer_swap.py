"""Layer swap (BR2V, arXiv 2505.05464): early layers stay the VLM's, the others are the weighted mean of `linear`.

    W = W_vlm                              layers in keep_layers
    W = a·W_vlm + (1 − a)·W_donor          everywhere else

The released run keeps layers 0 to 5 (k = 5) with a = 0.9. A tensor outside the layers (final norm, say) is in no kept
layer and is averaged. The name also stands for another method (arXiv 2410.01335), which replaces whole layers by those
of the other model: that is `vlm_weight: 0` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.alignment.select import select_layers
from vlmgraft.errors import AlignmentError, RecipeError
from vlmgraft.methods.base import Number, TensorContext, check_range
from vlmgraft.methods.linear import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from vlmgraft.alignment import Alignment

ANY_DEPTH = 1 << 20


@dataclass(frozen=True)
class LayerSwap:
    """Some layers are the VLM's, the others a mean; needs no base."""

    name: ClassVar[str] = "layer_swap"
    needs: ClassVar[frozenset[str]] = frozenset()
    default_modules: ClassVar[tuple[str, ...]] = ("all",)
    granularity: ClassVar[Literal["element", "tensor"]] = "element"

    vlm_weight: Number = 0.9
    """a, the VLM's share of the mean in the other layers, 0 to 1."""
    keep_layers: int | list[int] | str = "0-5"
    """Layers that stay the VLM's, counted from 0: "0-5", "0-5,20-27", one layer or a list."""

    def __post_init__(self) -> None:
        check_range(self, "vlm_weight", -float("inf"))
        self.kept  # noqa: B018  (reads the range, to refuse what is none)

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

    def combine(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """The VLM's piece in a kept layer, else a·vlm + (1 − a)·donor."""
        if context.layer in self.kept:
            return tensors["vlm"]
        return Linear(self.vlm_weight).combine(tensors, context)
