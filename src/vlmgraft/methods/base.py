"""What a merging method is: a frozen dataclass whose fields are its recipe, with one function on float32 tensors.

`granularity` says what `combine` is given: "element" methods get flat chunks of any size (64k elements in a merge) and
must treat every element alike; "tensor" methods get whole tensors in their shape. A method that brings its own update
(FRISM's factors, say) uses `tensors["vlm"]` and `context.name` and ignores the other sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from vlmgraft.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

Number = float | list[float] | dict[str, float]
"""A number for all tensors, a list over depth (first to last layer, interpolated), or a map by module group."""

DEFAULT_MODULES = ("attention", "mlp")


@dataclass(frozen=True)
class TensorContext:
    """Where a piece belongs. name: the VLM's name on disk. layer: None outside the layers. start: of the chunk."""

    name: str
    shape: tuple[int, ...]
    layers: int
    layer: int | None = None
    group: str = "other"
    start: int = 0


class Method(Protocol):
    """What a merge asks of a method. needs: checkpoints beside VLM and donor ("donor_base", "vlm_base")."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    default_modules: ClassVar[tuple[str, ...]]
    granularity: ClassVar[Literal["element", "tensor"]]

    def combine(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """The merged piece in float32 from float32 pieces of "vlm", "donor" and what `needs` names.

        Inputs are not changed; a result that is the VLM's piece is that very object, so that its bits survive.
        """


def number_for(value: Number, context: TensorContext, option: str) -> float:
    """The number that holds for one tensor: itself, interpolated over depth, or its group's.

    Raises:
        RecipeError: an empty list, a list for a tensor outside the layers, or a map without the tensor's group.
    """
    if isinstance(value, dict):
        if context.group not in value:
            raise RecipeError(f"method.{option}: has no value for group {context.group!r} ({context.name})")
        return float(value[context.group])
    if not isinstance(value, list):
        return float(value)
    if not value or context.layer is None:
        why = "the list is empty" if not value else f"{context.name} is in no layer; use a number or a map"
        raise RecipeError(f"method.{option}: {why}")
    place = context.layer / max(1, context.layers - 1) * (len(value) - 1)
    low = min(int(place), len(value) - 1)
    high = min(low + 1, len(value) - 1)
    return float(value[low] + (place - low) * (value[high] - value[low]))
