"""Float32 pieces of the merged tensors from the open checkpoints, checked for NaN and infinity.

A `Workspace` is the memory of one thread: it is allocated once, and every chunk is read and converted into it. A chunk
is checked by its squared norm, which is needed anyway and is finite only if every element is: one reduction instead of
a mask. If the square overflows, the elements are checked. `MergedPasses` iterates over the same pieces for methods that
must see all weights before they can merge any.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from vlmgraft.alignment import AlignedTensor, Alignment, Source, assemble
from vlmgraft.checkpoint.handles import TORCH_DTYPES, as_bytes
from vlmgraft.checkpoint.header import TensorInfo
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import NumericalError, WeightsError
from vlmgraft.merging.plan import CHUNK, WIDEST, lines_up, sources_of
from vlmgraft.methods.base import TensorContext
from vlmgraft.methods.scratch import reused
from vlmgraft.spectral.threads import in_order

Pieces = dict[str, Tensor]
S = TypeVar("S")
T = TypeVar("T")
AHEAD = 4
"""Queued tasks per thread: enough that no thread idles, few enough to stop soon after an error."""


WIDE = 4
"""Chunks that are sampled together, and that a thread takes at a time."""


def squared_norm(piece: Tensor) -> float:
    """‖piece‖² of a flat float32 piece; NaN exactly where the piece holds NaN or infinity."""
    found = math.fsum(float(torch.dot(part, part)) for part in piece.split(1 << 16))  # longer sums lose precision
    if math.isfinite(found):
        return found
    return float(piece.double().square().sum()) if torch.isfinite(piece).all() else math.nan


class Workspace:
    """The memory of one thread: a chunk of every checkpoint as on disk and in float32, a scratch, and the output."""

    def __init__(self, keys: Iterable[str]) -> None:
        names = (*keys, "out")
        self.raw = {name: torch.empty(CHUNK * WIDEST, dtype=torch.uint8) for name in names}
        self.views = {name: as_bytes(raw) for name, raw in self.raw.items()}
        self.floats = {name: torch.empty(CHUNK) for name in names}

    @property
    def scratch(self) -> Tensor:
        """One float32 chunk that belongs to no checkpoint."""
        return self.floats["out"]


@dataclass(frozen=True)
class Inputs:
    """The open checkpoints of an alignment, by key; every method may be called from several threads."""

    alignment: Alignment
    readers: dict[str, Reader]
    workspaces: SimpleQueue[Workspace] = field(default_factory=SimpleQueue)

    def sources(self, tensor: AlignedTensor) -> dict[str, Source]:
        """The sources of a tensor in the open checkpoints other than the VLM, by checkpoint."""
        return {key: source for key, source in sources_of(tensor).items() if key in self.readers}

    def digests(self, tensor: AlignedTensor) -> dict[str, dict[str, str]]:
        """Checkpoint → tensor on disk → digest of its bytes, for the inputs of a tensor that were read whole."""
        names = {"vlm": (tensor.name,)} | {key: source.names for key, source in self.sources(tensor).items()}
        return {key: self.readers[key].digests(of_key) for key, of_key in names.items()}

    def info(self, tensor: AlignedTensor) -> TensorInfo:
        """The VLM's header entry of a tensor."""
        return self.alignment.vlm.tensors[tensor.name]

    def context(self, tensor: AlignedTensor, start: int = 0) -> TensorContext:
        """Where a piece of the tensor belongs."""
        shape = self.info(tensor).shape
        return TensorContext(tensor.name, shape, self.alignment.layers, tensor.layer, tensor.group, start)

    def whole(self, tensor: AlignedTensor) -> tuple[Tensor, Pieces]:
        """The VLM's tensor as on disk, and every checkpoint's in float32 and the VLM's shape; not checked for NaN."""
        own = self.readers["vlm"].tensor(tensor.name)
        pieces = {"vlm": own.float()}
        for key, source in self.sources(tensor).items():
            pieces[key] = assemble(source, self.readers[key].tensor, own.shape, fill=own).float().contiguous()
        return own, pieces

    def one(self, tensor: AlignedTensor, key: str) -> Tensor:
        """The whole tensor of one checkpoint in float32 and the VLM's shape; raises WeightsError."""
        shape = self.info(tensor).shape
        if key == "vlm":
            found = self.readers["vlm"].tensor(tensor.name)
        else:
            source = sources_of(tensor)[key]
            fill = self.readers["vlm"].tensor(tensor.name) if source.layout.kind == "rows" else None
            found = assemble(source, self.readers[key].tensor, shape, fill=fill)
        piece = found.float().contiguous()
        self.check(tensor, {key: piece})
        return piece

    def chunk(self, tensor: AlignedTensor, start: int, count: int, workspace: Workspace) -> tuple[memoryview, Pieces]:
        """Elements from `start` on, in the workspace: the VLM's bytes as on disk, and all checkpoints' float32."""
        info = self.info(tensor)
        pieces = {"vlm": workspace.floats["vlm"][:count]}
        raw = self._read("vlm", tensor.name, start, pieces["vlm"], workspace)
        for key, source in self.sources(tensor).items():
            pieces[key] = workspace.floats[key][:count]
            shared = count
            if source.layout.kind == "rows":  # the rows that the source does not have are the VLM's
                shared = source.layout.rows * (info.elements // info.shape[0]) - start
                shared = max(0, min(count, shared))
                pieces[key][shared:] = pieces["vlm"][shared:]
            if shared:
                self._read(key, source.names[0], start, pieces[key][:shared], workspace)
            kept, width = source.layout.kept, info.elements // info.shape[0]
            for row in kept[bisect_left(kept, start // width) : bisect_left(kept, -(-(start + count) // width))]:
                inside = slice(max(0, row * width - start), (row + 1) * width - start)  # the row is another token's
                pieces[key][inside] = pieces["vlm"][inside]
        return raw, pieces

    def _read(self, key: str, name: str, start: int, out: Tensor, workspace: Workspace) -> memoryview:
        """Fill `out` with elements of a tensor on disk; returns their bytes."""
        info = self.readers[key].info(name)
        dtype = TORCH_DTYPES[info.dtype]
        raw = workspace.views[key][: out.numel() * dtype.itemsize]
        self.readers[key].read_bytes(info, start * dtype.itemsize, raw)
        out.copy_(workspace.raw[key][: len(raw)].view(dtype))
        return raw

    def check(self, tensor: AlignedTensor, pieces: Mapping[str, Tensor]) -> None:
        """Raise WeightsError naming the tensor on disk and its file where a piece is not finite."""
        for key, piece in pieces.items():
            if any(math.isnan(squared_norm(part)) for part in piece.reshape(-1).split(CHUNK)):
                self.refuse(tensor, key)

    def refuse(self, tensor: AlignedTensor, key: str) -> NoReturn:
        """Raise WeightsError for a tensor of one checkpoint that is not finite in float32."""
        names = (tensor.name,) if key == "vlm" else sources_of(tensor)[key].names
        for name in names:
            where = f"{name} in {self.readers[key].info(name).file} ({key})"
            stored = self.readers[key].tensor(name)
            if not torch.isfinite(stored).all():
                raise WeightsError(f"{where}: holds NaN or infinity; take a checkpoint whose weights are finite")
            if not torch.isfinite(stored.float()).all():
                raise WeightsError(f"{where}: holds values beyond float32, in which merges are computed")
        raise NumericalError(
            f"{tensor.name} ({key}): not finite, though its file is; the file changed while it was read"
        )


def chunks_of(
    inputs: Inputs, tensor: AlignedTensor, start: int, stop: int, workspace: Workspace, sample: int = 1
) -> Iterator[tuple[TensorContext, memoryview, Pieces]]:
    """(context, the VLM's bytes, float32 pieces) of every chunk of a range, in the workspace if sources line up.

    sample: only one in `sample` elements (at least `WIDE`, unless 1): the first of every `WIDE` chunks, rounded up.
    """
    step = CHUNK if sample == 1 else WIDE * CHUNK
    if lines_up(tensor):
        for first in range(start, stop, step):
            raw, pieces = inputs.chunk(tensor, first, -(-min(step, stop - first) // sample), workspace)
            yield inputs.context(tensor, first), raw, pieces
        return
    own, whole = inputs.whole(tensor)
    flat = {key: piece.reshape(-1) for key, piece in whole.items()}
    data, size = as_bytes(own), own.element_size()
    for first in range(0, stop, step):
        last = first + -(-min(step, stop - first) // sample)
        pieces = {key: piece[first:last] for key, piece in flat.items()}
        yield inputs.context(tensor, first), data[first * size : last * size], pieces


@dataclass(frozen=True)
class MergedPasses:
    """`methods.base.Passes` over the merged tensors, with the threads and the memory of the merge that follows."""

    inputs: Inputs
    pool: ThreadPoolExecutor
    threads: int
    may_guess: bool = False

    def tensors(self) -> Iterator[tuple[TensorContext, Callable[[str], Tensor]]]:
        """Every merged tensor with its loader."""
        for tensor in self._merged():
            yield self.inputs.context(tensor), lambda key, tensor=tensor: self.inputs.one(tensor, key)

    def chunks(self) -> Iterator[tuple[TensorContext, Mapping[str, Tensor]]]:
        """Every chunk, copied out of the threads' memory."""
        return self.map(lambda pieces, _: {key: piece.clone() for key, piece in pieces.items()})

    def map(
        self, function: Callable[[Mapping[str, Tensor], TensorContext], T], *, sample: int = 1
    ) -> Iterator[tuple[TensorContext, T]]:
        """Call `function` for every chunk, in the threads; results in order."""

        def work(task: tuple[AlignedTensor, int, int]) -> list[tuple[TensorContext, T]]:
            tensor, start, stop = task
            workspace = self.inputs.workspaces.get()
            try:
                made = []
                for context, _, pieces in chunks_of(self.inputs, tensor, start, stop, workspace, sample):
                    self.inputs.check(tensor, pieces)
                    with reused():
                        made.append((context, function(pieces, context)))
                return made
            finally:
                self.inputs.workspaces.put(workspace)

        tasks = (
            (tensor, start, stop)
            for tensor in self._merged()
            for start, stop in ranges(tensor, self.inputs.info(tensor).elements, WIDE * CHUNK)
        )
        for made in in_order(work, tasks, self.pool, AHEAD * self.threads):
            yield from made

    def _merged(self) -> Iterator[AlignedTensor]:
        return (tensor for tensor in self.inputs.alignment.merged if self.inputs.info(tensor).elements)


def ranges(tensor: AlignedTensor, elements: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut a tensor into ranges if all sources have the VLM's element order on disk; any other tensor is one range."""
    if not lines_up(tensor):
        step = elements
    for start in range(0, elements, step):
        yield start, min(elements, start + step)
