"""Merging range by range: threads take ranges of tensors, and process them chunk by chunk in their own memory.

Element methods run over chunks of 262,144 elements, small enough for the cache and large enough that threads seldom
wait for the interpreter. Arithmetic is float32; the cast to the VLM's dtype rounds to nearest even, or stochastically,
and the share of the change that survives the cast is recorded (`rounding.py`). Kept and excluded tensors are copied
byte for byte, as is a chunk that the method returns unchanged. A large tensor is shared among threads; its norms are
summed chunk by chunk in order, so that neither the receipt nor the weights depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmgraft.alignment import AlignedTensor
from vlmgraft.checkpoint.handles import TORCH_DTYPES, as_bytes
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.errors import NumericalError, WeightsError
from vlmgraft.merging.pieces import AHEAD, WIDE, Inputs, Pieces, Workspace, chunks_of, squared_norm
from vlmgraft.merging.plan import CHUNK, streamed
from vlmgraft.merging.rounding import ChunkFacts, inner, round_stochastically, survival
from vlmgraft.methods.base import Method, TensorContext
from vlmgraft.methods.scratch import reused
from vlmgraft.spectral.threads import in_order

RANGE = 16 * CHUNK
"""Elements per task: few enough to share a tensor between threads, enough that scheduling costs nothing."""


@dataclass(frozen=True)
class Task:
    """A range of one tensor, in elements if merged and in bytes if copied. last: the final range of its tensor."""

    tensor: AlignedTensor
    start: int
    stop: int
    last: bool


@dataclass(frozen=True)
class Merger:
    """The open inputs and the output; `work` is called from several threads.

    clamp: clamp and count values beyond the VLM's dtype; otherwise they are refused. allow_nonfinite: accept and count
    NaN and infinity in copied tensors; otherwise they are refused. seed: of stochastic rounding; None: to nearest even.
    compiled: use the pass of `compiled.py` where possible; the weights are the same.
    """

    inputs: Inputs
    method: Method
    writer: Writer
    clamp: bool = False
    allow_nonfinite: bool = False
    seed: int | None = None
    compiled: bool = False

    def run(self, pool: ThreadPoolExecutor, threads: int) -> Iterator[str]:
        """Copy and merge all tensors that are not done yet; yields the name of each tensor once it is written."""
        chunks: list[ChunkFacts] = []
        for task, made in in_order(self.work, self._tasks(), pool, AHEAD * threads):
            chunks += made
            if task.last:
                facts: dict[str, Any] = {"digest": self.writer.digest(task.tensor.name)}
                if self._merges(task.tensor):
                    facts |= self._facts(task.tensor, chunks)
                elif nonfinite := sum(chunk.nonfinite for chunk in chunks):
                    self._refuse_nonfinite(task.tensor, nonfinite)
                    facts["nonfinite"] = nonfinite
                facts["read"] = self.inputs.digests(task.tensor)
                self.writer.finish(task.tensor.name, facts)
                chunks = []
                yield task.tensor.name

    def _refuse_nonfinite(self, tensor: AlignedTensor, count: int) -> None:
        """Raise WeightsError for NaN or infinity in a copied tensor, unless they are allowed."""
        if not self.allow_nonfinite:
            raise WeightsError(
                f"{tensor.name} in {self.inputs.info(tensor).file}: is {tensor.verdict}, and {count} of its values are "
                "NaN or infinite; take a checkpoint whose weights are finite, or write output: {allow_nonfinite: true}"
            )

    def _facts(self, tensor: AlignedTensor, chunks: list[ChunkFacts]) -> dict[str, Any]:
        added, along = math.fsum(one.added for one in chunks), math.fsum(one.along for one in chunks)
        error = math.fsum(one.error for one in chunks)
        changed, clamped = sum(one.changed for one in chunks), sum(one.clamped for one in chunks)
        kept = survival(added, error, along, changed, self.inputs.info(tensor).elements)
        facts = {"added": math.sqrt(added), "task_vector": self._task_vector(tensor, chunks), **asdict(kept)}
        facts["weight"] = math.sqrt(math.fsum(one.weight for one in chunks))
        if (tally := self.method.tally(tensor.name)) is not None:
            facts["tally"] = tally
        return facts | ({"clamped": clamped} if clamped else {})

    def _task_vector(self, tensor: AlignedTensor, chunks: list[ChunkFacts]) -> float | None:
        """‖donor − base‖ from the chunks' squares, or from the method; None without a base."""
        if not self.method.reads_sources:
            return self.method.task_vector_norm(tensor.name)
        return math.sqrt(math.fsum(one.task_vector for one in chunks)) if tensor.donor_base else None

    def _merges(self, tensor: AlignedTensor) -> bool:
        return tensor.verdict == "merged" and self.inputs.info(tensor).elements > 0

    def _recast(self, tensor: AlignedTensor) -> bool:
        """Whether the output's dtype differs from the VLM's, so that bytes cannot be copied."""
        return self.writer.spec(tensor.name).dtype != self.inputs.info(tensor).dtype

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

    def work(self, task: Task) -> tuple[Task, list[ChunkFacts]]:
        """Copy or merge one range; returns the facts of its chunks."""
        workspace = self.inputs.workspaces.get()
        try:
            if not self._merges(task.tensor):
                return task, [ChunkFacts(nonfinite=self._copy(task, workspace))]
            if self.method.whole_tensors:
                return task, self._matrix(task.tensor, workspace)
            with reused():
                return task, list(self._chunks(task, workspace))
        finally:
            self.inputs.workspaces.put(workspace)

    def _chunks(self, task: Task, workspace: Workspace) -> Iterator[ChunkFacts]:
        """Merge a range chunk by chunk: in the compiled pass if possible, else in torch."""
        tensor, fast = task.tensor, self.compiled and self._in_bfloat16(task.tensor)
        step = WIDE * CHUNK if fast else task.stop - task.start
        for start in range(task.start, task.stop, step):
            stop = min(start + step, task.stop)
            if fast and (facts := self._fused(tensor, start, stop - start, workspace)) is not None:
                yield facts
                continue
            for context, raw, pieces in chunks_of(self.inputs, tensor, start, stop, workspace):
                yield self._chunk(tensor, context, raw, pieces, workspace)

    def _in_bfloat16(self, tensor: AlignedTensor) -> bool:
        """Whether all inputs and the output of a tensor are bfloat16 in the same order, rounded to nearest."""
        sources = self.inputs.sources(tensor)
        if self.seed is not None or any(source.layout.kind != "whole" for source in sources.values()):
            return False
        dtypes = {self.inputs.readers[key].info(source.names[0]).dtype for key, source in sources.items()}
        return dtypes | {self.inputs.info(tensor).dtype, self.writer.spec(tensor.name).dtype} == {"BF16"}

    def _fused(self, tensor: AlignedTensor, start: int, count: int, workspace: Workspace) -> ChunkFacts | None:
        """Merge one chunk in the compiled pass and write it; None, with nothing written, where torch must merge it."""
        fused = self.method.fused(self.inputs.context(tensor, start))
        names = {key: source.names[0] for key, source in self.inputs.sources(tensor).items()}
        if fused is None or (fused.form == "ties") != ("vlm_base" in names):
            return None
        from vlmgraft.merging.compiled import is_torch, merge_chunk

        if not is_torch(fused.form):
            return None
        raw = {key: workspace.views[key][: 2 * count] for key in ("vlm", *names)}
        for key, view in raw.items():
            reader = self.inputs.readers[key]
            reader.read_bytes(reader.info(names.get(key, tensor.name)), 2 * start, view)
        out = workspace.views["out"][: 2 * count]
        facts = merge_chunk(fused, raw, out)
        if facts is not None:
            self.writer.write_bytes(tensor.name, 2 * start, out)
        return facts

    def _copy(self, task: Task, workspace: Workspace) -> int:
        """Copy a range; returns how many of its values are NaN or infinite."""
        info, buffer = self.inputs.info(task.tensor), workspace.views["vlm"]
        nonfinite = 0
        for offset in range(task.start, task.stop, len(buffer)):
            piece = buffer[: min(len(buffer), task.stop - offset)]
            self.inputs.readers["vlm"].read_bytes(info, offset, piece)
            self.writer.write_bytes(info.name, offset, piece)
            nonfinite += count_nonfinite(workspace.raw["vlm"][: len(piece)], TORCH_DTYPES[info.dtype])
        return nonfinite

    def _chunk(
        self, tensor: AlignedTensor, context: TensorContext, raw: memoryview, pieces: Pieces, workspace: Workspace
    ) -> ChunkFacts:
        """Merge one chunk and write it."""
        own, moved = self._squares(tensor, pieces, workspace)
        merged = self.method.apply(pieces, context)
        if merged is pieces["vlm"] and not self._recast(tensor):
            self.writer.write_bytes(tensor.name, context.start * (len(raw) // merged.numel()), raw)
            return ChunkFacts(moved, weight=own)
        return self._write(tensor, context.start, (own, moved), merged, pieces["vlm"], workspace)

    def _matrix(self, tensor: AlignedTensor, workspace: Workspace) -> list[ChunkFacts]:
        """Merge a whole tensor and write it chunk by chunk."""
        raw, pieces = self.inputs.whole(tensor)
        flat = [dict(zip(pieces, parts, strict=True)) for parts in _split(pieces.values())]
        known = [self._squares(tensor, chunk, workspace) for chunk in flat]
        merged = self.method.apply(pieces, self.inputs.context(tensor))
        if merged is pieces["vlm"] and not self._recast(tensor):
            self.writer.write_bytes(tensor.name, 0, as_bytes(raw))
            return [ChunkFacts(moved, weight=own) for own, moved in known]
        return [
            self._write(tensor, number * CHUNK, known[number], piece, flat[number]["vlm"], workspace)
            for number, piece in enumerate(merged.reshape(-1).split(CHUNK))
        ]

    def _squares(self, tensor: AlignedTensor, pieces: Pieces, workspace: Workspace) -> tuple[float, float]:
        """‖VLM‖² and ‖donor − base‖² of a chunk; raises WeightsError where any checkpoint is not finite."""
        own, moved = squared_norm(pieces["vlm"]), 0.0
        found = own
        if "donor_base" in pieces:
            scratch = workspace.scratch[: pieces["vlm"].numel()]
            moved = squared_norm(torch.sub(pieces["donor"], pieces["donor_base"], out=scratch))
            found += moved
        elif "donor" in pieces:
            found += squared_norm(pieces["donor"])
        if "vlm_base" in pieces:
            found += squared_norm(pieces["vlm_base"])
        if math.isnan(found):
            self.inputs.check(tensor, pieces)
            raise NumericalError(f"{tensor.name}: donor − base is beyond float32")
        return own, moved

    def _write(
        self,
        tensor: AlignedTensor,
        start: int,
        squares: tuple[float, float],
        merged: Tensor,
        before: Tensor,
        workspace: Workspace,
    ) -> ChunkFacts:
        """Cast to the output's dtype and write a merged piece; squares: ‖before‖² and ‖donor − base‖².

        No element is larger than the norm, so that only a piece of very large norm is checked element by element.
        """
        spec = self.writer.spec(tensor.name)
        dtype = TORCH_DTYPES[spec.dtype]
        meant = torch.sub(merged, before, out=workspace.scratch[: merged.numel()])
        added = squared_norm(meant)
        if math.isnan(added):
            raise NumericalError(f"{tensor.name}: method {self.method.name} gave NaN or infinity from finite weights")
        raw = workspace.raw["out"][: merged.numel() * dtype.itemsize]
        cast = raw.view(dtype)
        if self.seed is None:
            cast.copy_(merged)
        else:
            round_stochastically(merged, cast, self.seed, self.inputs.context(tensor, start))
        bound = math.sqrt(squares[0]) + math.sqrt(added)
        clamped = 0
        if bound > 0.5 * torch.finfo(dtype).max and (clamped := int((~torch.isfinite(cast)).sum())):
            largest = torch.finfo(dtype).max
            if not self.clamp:
                raise NumericalError(
                    f"{tensor.name} of {self.inputs.info(tensor).file}: {clamped} merged values overflow {spec.dtype} "
                    f"(up to {float(merged.abs().max()):.4g}, it holds {largest:.4g}); use a smaller scale, or write "
                    "output: {overflow: clamp}"
                )
            cast.copy_(merged.clamp(-largest, largest))
        self.writer.write_bytes(tensor.name, start * dtype.itemsize, workspace.views["out"][: len(raw)])
        # the VLM's bytes are no longer needed: their memory takes the written values
        written = workspace.raw["vlm"][: 4 * merged.numel()].view(torch.float32).copy_(cast).sub_(before)
        changed = int(np.count_nonzero(written.numpy() != 0))  # six times as fast as torch's
        error = written.sub_(meant)
        return ChunkFacts(
            squares[1], added, squared_norm(error), inner(error, meant), changed, clamped, weight=squares[0]
        )


def count_nonfinite(raw: Tensor, dtype: torch.dtype) -> int:
    """How many values of `raw`, the bytes of a tensor of this dtype, are NaN or infinite; 0 for integer dtypes."""
    dtype = torch.float32 if dtype.is_complex else dtype
    if not dtype.is_floating_point:
        return 0
    total = 0
    for part in raw.view(dtype).split(1 << 16):  # torch reduces bfloat16 through a float32 copy
        values = part if dtype.itemsize > 1 else part.float()
        norm = torch.linalg.vector_norm(values, dtype=torch.float32 if dtype.itemsize < 4 else None)
        if not math.isfinite(norm):
            total += int((~torch.isfinite(values)).sum())
    return total


def _split(pieces: Any) -> Iterator[tuple[Tensor, ...]]:
    """The chunks of several tensors side by side."""
    return zip(*(piece.reshape(-1).split(CHUNK) for piece in pieces), strict=True)
