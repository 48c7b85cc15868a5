"""How tensors on disk hold the matrices of a text model, and how a VLM tensor is assembled from another checkpoint's.

A form describes how one tensor holds one or several parts (the matrices that Llama-like models store separately):

| form     | on disk                                             | parts                        |
|----------|-----------------------------------------------------|------------------------------|
| whole    | the matrix itself                                   | 1                            |
| rows     | matrices stacked along their rows                   | q, k, v; gate, up; up, gate  |
| wqkv     | [kv_heads · (group + 2) · head_dim, …] (InternLM2)  | q, k, v                      |
| gate_up  | [experts, 2·ff, hidden], or transposed              | gate, up of expert 0, 1, …   |
| down     | [experts, hidden, ff], or transposed                | down of expert 0, 1, …       |

InternLM2 interleaves by key-value head: `group` query heads, then their key head, then their value head. Qwen3-VL-MoE's
files on the hub are transposed (`[experts, hidden, 2·ff]`), those that transformers 5 saves are not: both are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from vlmgraft.errors import AlignmentError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """How a tensor holds its parts. `heads` is (kv_heads, group, head_dim) of wqkv; `rows` the rows of each part;
    `count` the number of experts."""

    kind: Literal["whole", "rows", "wqkv", "gate_up", "down"] = "whole"
    heads: tuple[int, int, int] = (0, 0, 0)
    rows: tuple[int, ...] = ()
    count: int = 1
    transposed: bool = False


WHOLE_FORM = Form()


@dataclass(frozen=True)
class Pick:
    """Part `part` of the tensor `source.names[name]`, which holds its parts in `form`."""

    name: int
    form: Form
    part: int


@dataclass(frozen=True)
class Layout:
    """How a source's tensors become one of the VLM's shape.

    `whole`: one tensor of the same shape, streamable in chunks. `rows`: another vocabulary, from which the first `rows`
    rows except `kept` are taken; all others are filled from the VLM. `parts`: `picks` are joined in the form `into`.
    """

    kind: Literal["whole", "rows", "parts"] = "whole"
    rows: int = 0
    kept: tuple[int, ...] = ()
    picks: tuple[Pick, ...] = ()
    into: Form = field(default=WHOLE_FORM)


WHOLE = Layout()


class Source(NamedTuple):
    """Tensors on disk (`names`, in one checkpoint) from which `layout` makes one tensor of the VLM's shape."""

    names: tuple[str, ...]
    layout: Layout = WHOLE

    @property
    def streamable(self) -> bool:
        """True when the one tensor on disk has the VLM's shape and element order, so that chunks line up."""
        return self.layout.kind == "whole"


def part_shapes(form: Form, shape: Shape) -> list[Shape]:
    """Shapes of the parts that a tensor of `shape` holds; raises ValueError where the form does not fit the shape."""
    if form.kind == "whole":
        return [shape]
    if form.kind == "rows":
        if shape[0] != sum(form.rows):
            raise ValueError(f"{' + '.join(map(str, form.rows))} are not {shape[0]} rows")
        return [(rows, *shape[1:]) for rows in form.rows]
    if form.kind == "wqkv":
        heads, group, dim = form.heads
        if shape[0] != heads * (group + 2) * dim:
            raise ValueError(f"{heads} key-value heads × ({group} + 2) × head size {dim} are not {shape[0]} rows")
        return [(heads * n * dim, *shape[1:]) for n in (group, 1, 1)]
    out, inner = (shape[2], shape[1]) if form.transposed else (shape[1], shape[2])
    if form.kind == "gate_up":
        if out % 2:
            raise ValueError(f"an odd number of rows ({out}) holds gate and up")
        return [(out // 2, inner)] * (2 * shape[0])
    return [(out, inner)] * shape[0]


def split(tensor: Tensor, form: Form) -> list[Tensor]:
    """The parts of `tensor` held in `form`, as views where the form allows."""
    if form.kind == "whole":
        return [tensor]
    if form.kind == "rows":
        return list(tensor.split(form.rows))
    if form.kind == "wqkv":
        heads, group, dim = form.heads
        tail = tensor.shape[1:]
        stacked = tensor.reshape(heads, group + 2, dim, *tail)
        pieces = (stacked[:, :group], stacked[:, group : group + 1], stacked[:, group + 1 :])
        return [piece.reshape(-1, *tail) for piece in pieces]
    experts = [expert.T if form.transposed else expert for expert in tensor]
    if form.kind == "down":
        return experts
    return [half for expert in experts for half in expert.chunk(2, dim=0)]


def join(parts: Sequence[Tensor], form: Form) -> Tensor:
    """The tensor that holds `parts` in `form`; the inverse of `split`."""
    import torch

    if form.kind == "whole":
        return parts[0]
    if form.kind == "rows":
        return torch.cat(list(parts))
    if form.kind == "wqkv":
        heads, _, dim = form.heads
        tail = parts[0].shape[1:]
        return torch.cat([part.reshape(heads, -1, dim, *tail) for part in parts], dim=1).reshape(-1, *tail)
    if form.kind == "gate_up":
        parts = [torch.cat([gate, up]) for gate, up in zip(parts[::2], parts[1::2], strict=True)]
    return torch.stack([part.T if form.transposed else part for part in parts]).contiguous()


def assemble(source: Source, read: Callable[[str], Tensor], shape: Shape, fill: Tensor | None = None) -> Tensor:
    """One tensor of the VLM's `shape` from the tensors `source.names`, in the files' dtype (if it is filled, in the
    wider of the two files' dtypes).

    Args:
        read: reads a tensor of the source's checkpoint by its name on disk.
        fill: the VLM's own tensor. Vocabulary rows that the sources do not share are copied from it into donor and base
            alike: their task vector is then zero, and every method leaves them unchanged.
    Raises:
        AlignmentError: rows must be filled and `fill` is None, or the result has another shape than planned.
    """
    import torch

    layout = source.layout
    if layout.kind == "parts":
        held: dict[int, list[Tensor]] = {}
        for pick in layout.picks:
            if pick.name not in held:
                held[pick.name] = split(read(source.names[pick.name]), pick.form)
        result = join([held[pick.name][pick.part] for pick in layout.picks], layout.into)
    elif layout.kind == "rows" and (layout.rows < shape[0] or layout.kept):
        if fill is None:
            raise AlignmentError(f"{source.names[0]}: not all rows are shared; pass the VLM's tensor as fill")
        own = read(source.names[0])
        result = fill.to(torch.promote_types(fill.dtype, own.dtype), copy=True)
        result[: layout.rows] = own[: layout.rows]
        result[list(layout.kept)] = fill[list(layout.kept)].to(result.dtype)
    else:
        result = read(source.names[0])[: shape[0]] if layout.kind == "rows" else read(source.names[0])
    if tuple(result.shape) != tuple(shape):
        raise AlignmentError(f"{', '.join(source.names)}: assembled to {tuple(result.shape)}, not {tuple(shape)}")
    return result
