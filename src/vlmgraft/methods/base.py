"""The interface of merging methods: a frozen dataclass of the recipe's options, with one function on float32 tensors.

A merge calls `check(alignment)` on headers, then `prepare(passes)` once, and streams `apply` of the method that
`prepare` returns. Most methods need no preparation and return themselves; one that must see the weights first (for a
global threshold, say) returns another `Method` that holds the results of its passes.

Numeric options are annotated `Number`, `Number | None` or `Pair`, so that `check_numbers` finds them and evaluates each
of them for every tensor before a merge starts.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from vlmgraft.alignment.view import GROUPS
from vlmgraft.errors import RecipeError
from vlmgraft.spectral.rank import check_matrix

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
    """Where a piece belongs. name: the VLM's name on disk. layer: None outside the layers. start: first element."""

    name: str
    shape: tuple[int, ...]
    layers: int
    layer: int | None = None
    group: str = "other"
    start: int = 0


@dataclass(frozen=True)
class Fused:
    """A method's operation on one element, for the compiled pass (`merging/compiled.py`); it must agree with `apply`.

    add          vlm + λ·(donor − donor_base)        numbers: λ
    lerp         donor + a·(vlm − donor)             a
    sum          a·vlm + b·donor                     a, b
    ties         `ties.py` with an unweighted election and the mean: both thresholds, both weights, λ

    tally: for `ties`, called with the number of elements and, for each task vector, the numbers of magnitudes above the
    threshold and at or above it.
    """

    form: Literal["add", "lerp", "sum", "ties"]
    numbers: tuple[float, ...]
    tally: Callable[[int, tuple[int, int], tuple[int, int]], None] | None = None


class Passes(Protocol):
    """Passes over the merged tensors, in disk order, for `prepare`. Every call starts a new pass over the files.

    Keys are "vlm", "donor" and the bases that the recipe gives. All pieces are float32 and finite: WeightsError names
    tensor and file otherwise. may_guess: guesses are allowed, since the merge that follows verifies them (`bears_out`).
    """

    @property
    def may_guess(self) -> bool: ...

    def tensors(self) -> Iterator[tuple[TensorContext, Callable[[str], Tensor]]]:
        """Every merged tensor with a loader: `loader(key)` reads the whole tensor of that checkpoint, in its shape."""

    def chunks(self) -> Iterator[tuple[TensorContext, Mapping[str, Tensor]]]:
        """Every flat chunk that a method without `whole_tensors` will get, in order; the caller may keep it."""

    def map(
        self, function: Callable[[Mapping[str, Tensor], TensorContext], T], *, sample: int = 1
    ) -> Iterator[tuple[TensorContext, T]]:
        """Call `function(chunk, context)` for every chunk from several threads, results in order: the fast pass.

        sample: read only about one in `sample` elements of every tensor, in pieces spread over the tensor.
        The chunk's memory is reused after the call: the function must return a number or a small tensor of its own.
        """


@dataclass(frozen=True)
class Method:
    """Base of all methods.

    name: in recipes. needs: checkpoints beside VLM and donor ("donor_base", "vlm_base"). default_modules: merged where
    the recipe names none. whole_tensors: `apply` gets whole tensors in their shape; else flat chunks (of 262,144
    elements in a merge, the last one shorter; `context.start` is the index of the first element), in which it must
    treat every element alike. matrices_only: `check_numbers` refuses tensors without singular directions. passes: how
    many passes over the merged weights `prepare` makes, for the plan's estimate. reads_sources: False for a method that
    brings its own update (FRISM's factors): it gets the VLM's tensors only.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    default_modules: ClassVar[tuple[str, ...]] = DEFAULT_MODULES
    whole_tensors: ClassVar[bool] = False
    matrices_only: ClassVar[bool] = False
    passes: ClassVar[int] = 0
    reads_sources: ClassVar[bool] = True

    def check(self, alignment: Alignment) -> None:
        """Refuse options that do not fit the aligned models; raises RecipeError before a merge starts."""

    def prepare(self, passes: Passes) -> Method:
        """The method that the merge applies: this one, or another that holds results of `passes` over the weights."""
        return self

    @property
    def guessed(self) -> bool:
        """Whether a prepared method holds guesses, which `bears_out` verifies."""
        return False

    def tally(self, name: str) -> Any:
        """Counts that a method with guesses made while it merged a tensor, as JSON values; None without counts."""
        return None

    def bears_out(self, tallies: Sequence[Any]) -> bool:
        """Whether the tallies of all merged tensors confirm the guesses of `prepare`. If not, the merge is repeated
        without guesses."""
        return True

    def notes(self) -> tuple[str, ...]:
        """Notes of a prepared method for the receipt and the terminal."""
        return ()

    def task_vector_norm(self, name: str) -> float | None:
        """‖τ‖_F of a tensor, from a method that knows it without reading sources (`reads_sources` is False)."""
        return None

    def sources_read(self) -> Mapping[str, Mapping[str, str]]:
        """Checkpoint → tensor → digest of what a method without `reads_sources` read before the merge."""
        return {}

    def apply(self, tensors: Mapping[str, Tensor], context: TensorContext) -> Tensor:
        """The merged float32 piece from float32 pieces of "vlm", "donor" and the checkpoints in `needs`.

        Inputs must be neither changed nor kept: a merge reuses their memory, and the memory of a result from `scratch`,
        from which a method on chunks should allocate. If the result is the VLM's piece, `apply` must return that very
        object, so that its bytes are kept. Called from several threads.
        """
        raise NotImplementedError(f"{self.name}: a merge streams what `prepare` gives back")

    def fused(self, context: TensorContext) -> Fused | None:
        """`apply` of a chunk as one of the compiled forms; None if no form fits or the result is the VLM's piece."""
        return None


def number_for(value: Number, context: TensorContext, option: str) -> float:
    """The option's number for one tensor: the number itself, interpolated over depth, or its group's."""
    if isinstance(value, dict):
        if context.group not in value:
            raise RecipeError(f"method.{option}: has no value for group {context.group!r} ({context.name})")
        return float(value[context.group])
    if not isinstance(value, list):
        return float(value)
    if not value or context.layer is None:
        why = "the list is empty" if not value else f"{context.name} is in no layer; use a number or a map"
        raise RecipeError(f"method.{option}: {why}")
    depth = context.layer / max(1, context.layers - 1) * (len(value) - 1)
    low = min(int(depth), len(value) - 1)
    high = min(low + 1, len(value) - 1)
    return float(value[low] + (depth - low) * (value[high] - value[low]))


def numbers_of(method: Method) -> Iterator[tuple[str, Number]]:
    """(option, value) of fields annotated `Number`, `Number | None` (if set) or `Pair` (`option[0]`, `option[1]`)."""
    for field in fields(method):
        value = getattr(method, field.name)
        if field.type in ("Number", "Number | None") and value is not None:
            yield field.name, value
        elif field.type == "Pair":
            yield from ((f"{field.name}[{index}]", number) for index, number in enumerate(value))


def check_range(
    method: Method, *options: str, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> None:
    """Refuse options with a number that is not finite, under `low` (at it, when `above`) or over `high`.

    Raises:
        RecipeError: with the option, the number and the range.
    """
    for name, value in numbers_of(method):
        if name.partition("[")[0] not in options:
            continue
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for number in numbers:
            if not math.isfinite(number) or number < low or number > high or (above and number == low):
                bounds = f"{'above' if above else 'at least'} {low:g}"
                bounds += f" and at most {high:g}" if high < math.inf else ""
                raise RecipeError(f"method.{name}: {number} must be {bounds if low > -math.inf else 'finite'}")


def check_numbers(method: Method, alignment: Alignment) -> None:
    """Validate the method's options for every tensor that it will merge, before a merge starts.

    Raises:
        RecipeError: a map with an unknown group or without a tensor's group, a list for a tensor outside the layers, or
            an option that the method's own `check(alignment)` refuses.
        AlignmentError: a method with `matrices_only` would get a tensor that is not a matrix.
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
    if method.matrices_only:
        for tensor in alignment.merged:
            check_matrix(tensor.name, alignment.vlm.tensors[tensor.name].shape)
    method.check(alignment)
