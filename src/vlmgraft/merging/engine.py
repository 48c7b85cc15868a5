"""Merges range by range: ranges of tensors go to threads, chunks through their memory.

Element methods run over chunks of 262,144 elements: they stay in the cache, and are long enough that threads seldom
wait for the interpreter. Arithmetic is float32, the cast to the VLM's dtype rounds to nearest even. Tensors that are
kept or excluded are copied byte for byte, and so is a chunk that the method gives back unchanged. A large tensor is
shared among threads; its norms are summed chunk by chunk in order, so that the receipt, like the weights, does not
depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmgraft.alignment import AlignedTensor
from vlmgraft.checkpoint.reader import TORCH_DTYPES, as_bytes
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.errors import NumericalError
from vlmgraft.merging.passes import in_order
from vlmgraft.merging.pieces import Inputs, Lane, Pieces, chunks_of, squared_norm
from vlmgraft.merging.plan import CHUNK, streamed
from vlmgraft.methods.base import Method, TensorContext
from vlmgraft.methods.scratch import reused

RANGE = 16 * CHUNK
"""Elements per task: small enough to share a tensor between threads, large enough that handing out costs nothing."""


@dataclass(frozen=True)
class Task:
    """A range of one tensor, in elements of a merged and bytes of a copied one; `last` of the tensor."""

    tensor: AlignedTensor
    start: int
    stop: int
    last: bool


Facts = tuple[float, float, int]
"""Of a chunk: ‖what was added‖², ‖task vector‖², and how many values were clamped."""


@dataclass(frozen=True)
class Merger:
    """The open inputs and the output; `work` is called from several threads. clamp: values beyond the VLM's dtype
    become its largest, and are counted; else they are refused."""

    inputs: Inputs
    method: Method
    writer: Writer
    clamp: bool = False

    def run(self, pool: ThreadPoolExecutor, threads: int) -> Iterator[str]:
        """Copy and merge everything that is not done yet; gives the name of each tensor once it is written."""
        added: list[float] = []
        moved: list[float] = []
        clamped = 0
        for task, squares in in_order(self.work, self._tasks(), pool, threads):
            added += (one for one, _, _ in squares)
            moved += (other for _, other, _ in squares)
            clamped += sum(count for *_, count in squares)
            if task.last:
                facts: dict[str, Any] = {"digest": self.writer.digest(task.tensor.name)}
                if self._merges(task.tensor):
                    facts["added"] = math.sqrt(math.fsum(added))
                    facts["task_vector"] = math.sqrt(math.fsum(moved)) if task.tensor.donor_base else None
                    facts |= {"clamped": clamped} if clamped else {}
                self.writer.finish(task.tensor.name, facts)
                added, moved, clamped = [], [], 0
                yield task.tensor.name

    def _merges(self, tensor: AlignedTensor) -> bool:
        return tensor.verdict == "merged" and self.inputs.info(tensor).elements > 0

    def _tasks(self) -> Iterator[Task]:
        for tensor in self.inputs.alignment.tensors:
            if tensor.name in self.writer.done:
                continue
            info = self.inputs.info(tensor)
            size, step = info.nbytes, 4 * RANGE
            if self._merges(tensor):
                size, step = info.elements, RANGE if streamed(tensor, self.method) else info.elements
            for start in range(0, max(size, 1), step):
                yield Task(tensor, start, min(size, start + step), start + step >= size)

    def work(self, task: Task) -> tuple[Task, list[Facts]]:
        """Copy or merge one range; what is known of its chunks."""
        lane = self.inputs.lanes.get()
        try:
            if not self._merges(task.tensor):
                self._copy(task, lane)
                return task, []
            if self.method.granularity == "tensor":
                return task, self._matrix(task.tensor, lane)
            pieces = chunks_of(self.inputs, task.tensor, task.start, task.stop, lane)
            with reused():
                return task, [self._chunk(task.tensor, context, raw, chunk, lane) for context, raw, chunk in pieces]
        finally:
            self.inputs.lanes.put(lane)

    def _copy(self, task: Task, lane: Lane) -> None:
        info, buffer = self.inputs.info(task.tensor), lane.views["vlm"]
        for offset in range(task.start, task.stop, len(buffer)):
            piece = buffer[: min(len(buffer), task.stop - offset)]
            self.inputs.readers["vlm"].read_bytes(info, offset, piece)
            self.writer.write_bytes(info.name, offset, piece)

    def _chunk(
        self, tensor: AlignedTensor, context: TensorContext, raw: memoryview, pieces: Pieces, lane: Lane
    ) -> Facts:
        """Merge one chunk and write it."""
        own, moved = self._squares(tensor, pieces, lane)
        merged = self.method.combine(pieces, context)
        if merged is pieces["vlm"]:
            self.writer.write_bytes(tensor.name, context.start * (len(raw) // merged.numel()), raw)
            return 0.0, moved, 0
        added, clamped = self._write(tensor, context.start, own, merged, pieces["vlm"], lane)
        return added, moved, clamped

    def _matrix(self, tensor: AlignedTensor, lane: Lane) -> list[Facts]:
        """Merge a whole tensor and write it chunk by chunk."""
        raw, pieces = self.inputs.whole(tensor)
        flat = [dict(zip(pieces, parts, strict=True)) for parts in _split(pieces.values())]
        known = [self._squares(tensor, chunk, lane) for chunk in flat]
        merged = self.method.combine(pieces, self.inputs.context(tensor))
        if merged is pieces["vlm"]:
            self.writer.write_bytes(tensor.name, 0, as_bytes(raw))
            return [(0.0, moved, 0) for _, moved in known]
        made: list[Facts] = []
        for number, piece in enumerate(merged.reshape(-1).split(CHUNK)):
            own, moved = known[number]
            added, clamped = self._write(tensor, number * CHUNK, own, piece, flat[number]["vlm"], lane)
            made.append((added, moved, clamped))
        return made

    def _squares(self, tensor: AlignedTensor, pieces: Pieces, lane: Lane) -> tuple[float, float]:
        """‖VLM‖² and ‖donor − base‖² of a chunk; raises WeightsError where any checkpoint is not finite."""
        own, moved = squared_norm(pieces["vlm"]), 0.0
        found = own
        if "donor_base" in pieces:
            scratch = lane.scratch[: pieces["vlm"].numel()]
            moved = squared_norm(torch.sub(pieces["donor"], pieces["donor_base"], out=scratch))
            found += moved
        else:
            found += squared_norm(pieces["donor"])
        if "vlm_base" in pieces:
            found += squared_norm(pieces["vlm_base"])
        if math.isnan(found):
            self.inputs.check(tensor, pieces)
            raise NumericalError(f"{tensor.name}: donor − base is beyond float32")
        return own, moved

    def _write(
        self, tensor: AlignedTensor, start: int, own: float, merged: Tensor, before: Tensor, lane: Lane
    ) -> tuple[float, int]:
        """Cast and write a merged piece; gives ‖merged − before‖² and how many values were clamped. own: ‖before‖².

        No element is larger than the norm, so that only a piece of enormous norm is looked at element by element.
        """
        info = self.inputs.info(tensor)
        dtype = TORCH_DTYPES[info.dtype]
        added = squared_norm(torch.sub(merged, before, out=lane.scratch[: merged.numel()]))
        if math.isnan(added):
            raise NumericalError(f"{tensor.name}: method {self.method.name} gave NaN or infinity from finite weights")
        raw = lane.raw["out"][: merged.numel() * dtype.itemsize]
        cast = raw.view(dtype).copy_(merged)
        bound = math.sqrt(own) + math.sqrt(added)
        clamped = 0
        if bound > 0.5 * torch.finfo(dtype).max and (clamped := int((~torch.isfinite(cast)).sum())):
            largest = torch.finfo(dtype).max
            if not self.clamp:
                raise NumericalError(
                    f"{tensor.name} of {info.file}: {clamped} merged values overflow {info.dtype} (up to "
                    f"{float(merged.abs().max()):.4g}, it holds {largest:.4g}); use a smaller scale, or write "
                    "output: {overflow: clamp}"
                )
            cast.copy_(merged.clamp(-largest, largest))
        self.writer.write_bytes(tensor.name, start * dtype.itemsize, lane.views["out"][: len(raw)])
        return added, clamped


def _split(pieces: Any) -> Iterator[tuple[Tensor, ...]]:
    """The chunks of several tensors side by side."""
    return zip(*(piece.reshape(-1).split(CHUNK) for piece in pieces), strict=True)
