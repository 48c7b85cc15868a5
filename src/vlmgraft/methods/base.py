"""What a merging method is: a frozen dataclass whose fields are its recipe, with one function on float32 tensors.

`granularity` says what `combine` is given: "element" methods get flat chunks (of 262,144 elements in a merge, the last
one shorter; `context.start` is the first element's number) and must treat every element alike; "tensor" methods get
whole tensors in their shape. A method that brings its own update (FRISM's factors, say) uses `tensors["vlm"]` and
`context.name` and ignores the other sources.

A method that must see the weights before it can merge (a global threshold, say) also defines
`prepare(self, passes: Passes) -> Method`. A merge calls it once, before streaming, and streams the method it gives
back, which holds what the passes found; `combine` may be left to that one. `passes` of the class says how many it
makes, for the plan's estimate; `notes()` of what it gives back is what the receipt should say.

Options that are numbers are annotated `Number` or `Pair`, so that `check_numbers` finds them and reads every one for
every tensor before a merge starts. What else depends on the models a method checks in `check(self, alignment)`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar

from vlmgraft.alignment.view import GROUPS
from vlmgraft.errors import AlignmentError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from vlmgraft.alignment import Alignment

T = TypeVar("T")

Number = float | list[float] | dict[str, float]
"""A number for all tensors, a list over depth (first to last layer, interpolated), or a map by module group."""

Pair = tuple[Number, Number]
"""One number for the VLM and one for the donor."""

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


class Passes(Protocol):
    """Passes over the merged tensors, in disk order, for `prepare`. Every call starts a new pass over the files.

    Keys are "vlm", "donor" and the bases that the recipe gives. All pieces are float32 and finite: WeightsError names
    the tensor and file that is not.
    """

    def tensors(self) -> Iterator[tuple[TensorContext, Callable[[str], Tensor]]]:
        """Every merged tensor with a loader: `loader(key)` reads the whole tensor of that checkpoint, in its shape."""

    def chunks(self) -> Iterator[tuple[TensorContext, Mapping[str, Tensor]]]:
        """Every flat chunk that `combine` of an "element" method will be given, one after the other; yours to keep."""

    def map(
        self, function: Callable[[Mapping[str, Tensor], TensorContext], T], *, sample: int = 1
    ) -> Iterator[tuple[TensorContext, T]]:
        """`function(chunk, context)` of every chunk, called from several threads, results in order: the fast pass.

        sample: read only about one element in so many of every tensor, in pieces spread over it.
        The chunk's memory is used again after the call: the function gives back a number or a small tensor of its own.
        """


class Method(Protocol):
    """What a merge asks of a method. needs: checkpoints beside VLM and donor ("donor_base", "vlm_base")."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    default_modules: ClassVar[tuple[str, ...]]
    granularity: ClassVar[Literal["element", "tensor"]]

    def combine(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """The merged piece in float32 from float32 pieces of "vlm", "donor" and what `needs` names.

        Inputs are not changed and not kept: a merge uses their memory again, and the result's too where it comes from
        `scratch`, which an "element" method should take all its memory from. A result that is the VLM's piece is that
        very object, so that its bits survive. Called from several threads.
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


def numbers_of(method: object) -> Iterator[tuple[str, Number]]:
    """(option, value) of every field annotated `Number` or `Pair`; a pair gives `option[0]` and `option[1]`."""
    for field in fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        if field.type == "Number":
            yield field.name, value
        elif field.type == "Pair":
            yield from ((f"{field.name}[{place}]", one) for place, one in enumerate(value))


def check_range(method: object, option: str, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Refuse an option with a number that is not finite, under `low` (at it, when `above`) or over `high`.

    Raises:
        RecipeError: with the option, the number and the range.
    """
    for name, value in numbers_of(method):
        if name.partition("[")[0] != option:
            continue
        every: Iterable[float] = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        )
        for number in every:
            if not math.isfinite(number) or number < low or number > high or (above and number == low):
                said = f"{'above' if above else 'at least'} {low:g}" + (
                    f" and at most {high:g}" if high < math.inf else ""
                )
                raise RecipeError(f"method.{name}: {number} must be {said if low > -math.inf else 'finite'}")


def check_numbers(method: object, alignment: Alignment) -> None:
    """Prove before a merge that the method's options hold for every tensor that it will be given.

    Raises:
        RecipeError: a map with an unknown group or without a tensor's group, a list for a tensor outside the layers, or
            what the method's own `check(alignment)` refuses.
        AlignmentError: a method of matrices is given a tensor that is none.
    """
    merged = {(tensor.group, tensor.layer is None): tensor for tensor in reversed(alignment.merged)}
    for option, value in numbers_of(method):
        for group in value if isinstance(value, dict) else ():
            if group not in GROUPS:
                near = difflib.get_close_matches(group, GROUPS, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise RecipeError(f"method.{option}: {group!r} is no group ({', '.join(GROUPS)}){hint}")
        for tensor in merged.values():
            number_for(value, TensorContext(tensor.name, (), alignment.layers, tensor.layer, tensor.group), option)
    if getattr(method, "matrices_only", False):
        for tensor in alignment.merged:
            check_matrix(tensor.name, alignment.vlm.tensors[tensor.name].shape)
    if hasattr(method, "check"):
        method.check(alignment)


def check_matrix(name: str, shape: tuple[int, ...]) -> None:
    """Refuse what has no singular directions: all but matrices [out, in] and stacks of them [experts, out, in]."""
    if len(shape) not in (2, 3) or 0 in shape:
        raise AlignmentError(
            f"{name}: shape {tuple(shape)} is not a matrix and has no singular directions; leave it out of `modules`"
        )
