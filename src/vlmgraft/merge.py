"""Merges an alignment by a method: everything is checked on headers, then streamed, then published with its receipt.

Element methods run over 64k-element chunks, which stay in the cache; arithmetic is float32, the cast to the VLM's dtype
rounds to nearest even. Tensors that are kept or excluded are copied byte for byte, and so is a chunk that the method
gives back unchanged.
"""

from __future__ import annotations

import hashlib
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmgraft import __version__
from vlmgraft.alignment import AlignedTensor, Alignment, assemble
from vlmgraft.checkpoint.reader import TORCH_DTYPES, Reader
from vlmgraft.checkpoint.writer import TensorSpec, Writer, refuse_output
from vlmgraft.errors import AlignmentError, NumericalError, WeightsError
from vlmgraft.methods.base import Method, TensorContext
from vlmgraft.records import write_json

CHUNK = 1 << 16
COPY = 1 << 22
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TensorReceipt:
    """One tensor. added: Frobenius norm of (merged − VLM) before the cast; task_vector: of donor − base."""

    name: str
    verdict: str
    reason: str
    sources: dict[str, list[str]]
    added: float = 0.0
    task_vector: float | None = None


@dataclass(frozen=True)
class Receipt:
    """What a merge did. peak_memory: of the whole process, bytes. Written as receipt.json."""

    method: str
    tensors: tuple[TensorReceipt, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    seconds: float
    peak_memory: int


def merge_tensors(
    alignment: Alignment,
    method: Method,
    out: str | Path,
    *,
    shard_size: int = 5 * 10**9,
    threads: int = 2,
    progress: Progress | None = None,
    extra_files: Sequence[Path] = (),
    resume: bool = False,
) -> Receipt:
    """Write the merged checkpoint `out`: the VLM's names, dtypes and shapes, `extra_files` copied, receipt.json.

    Raises:
        OutputError: `out` exists or is an input. AlignmentError: a checkpoint that the method needs is missing, or the
            task vector is zero. WeightsError: an input holds NaN or infinity, naming tensor and file. NumericalError:
            overflow on the cast. Nothing is published then and no partial folder stays.
    """
    began = time.perf_counter()
    sources = {key: getattr(alignment, key) for key in ("vlm", "donor", "donor_base", "vlm_base")}
    opened = {key: checkpoint for key, checkpoint in sources.items() if checkpoint is not None}
    missing = sorted(method.needs - set(opened))
    if missing:
        raise AlignmentError(f"{missing[0]}: method {method.name} needs it")
    refuse_output(Path(out), [checkpoint.path for checkpoint in opened.values()])
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in alignment.vlm.tensors.values()]
    times = [file.stat().st_mtime_ns for checkpoint in opened.values() for file in checkpoint.files]
    key = hashlib.sha256(repr((method, times, opened, alignment.tensors, shard_size)).encode()).hexdigest()[:16]
    with ExitStack() as stack:
        readers = {name: stack.enter_context(Reader(checkpoint)) for name, checkpoint in opened.items()}
        writer = stack.enter_context(Writer(out, specs, shard_size, resume=key if resume else None))
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        merger = _Merger(alignment, method, readers, writer)
        todo = [tensor for tensor in alignment.tensors if tensor.name not in writer.done]
        for number, facts in enumerate(pool.map(merger.tensor, todo)):
            writer.finish(todo[number].name, facts)
            if progress is not None:
                progress(len(writer.done), len(specs), todo[number].name)
        rows = tuple(_row(tensor, writer.done[tensor.name]) for tensor in alignment.tensors)
        if "donor_base" in opened and not any(row.task_vector for row in rows):
            raise AlignmentError(f"the task vector is zero: {alignment.donor.path} and its base hold the same weights")
        for file in extra_files:
            shutil.copyfile(file, writer.folder / file.name)
        versions = {"vlmgraft": __version__, "torch": torch.__version__}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        receipt = Receipt(method.name, rows, alignment.notes, versions, time.perf_counter() - began, peak)
        write_json(writer.folder / "receipt.json", asdict(receipt))
    return receipt


def _row(tensor: AlignedTensor, facts: dict[str, Any]) -> TensorReceipt:
    found = {key: getattr(tensor, key) for key in ("donor", "donor_base", "vlm_base")}
    names = {key: list(source.names) for key, source in found.items() if source is not None}
    return TensorReceipt(tensor.name, tensor.verdict, tensor.reason, names, **facts)


@dataclass(frozen=True)
class _Merger:
    """The open inputs and the output; `tensor` is called from several threads."""

    alignment: Alignment
    method: Method
    readers: dict[str, Reader]
    writer: Writer

    def tensor(self, tensor: AlignedTensor) -> dict[str, Any]:
        """Copy or merge one tensor and give the facts of its receipt."""
        info = self.alignment.vlm.tensors[tensor.name]
        if tensor.verdict != "merged" or info.elements == 0:
            buffer = memoryview(bytearray(min(COPY, info.nbytes)))
            for offset in range(0, info.nbytes, COPY):
                piece = buffer[: min(COPY, info.nbytes - offset)]
                self.readers["vlm"].read_bytes(info, offset, piece)
                self.writer.write_bytes(tensor.name, offset, piece)
            return {}
        added, moved = 0.0, 0.0
        for start, own, pieces in self._pieces(tensor):
            layer, group = tensor.layer, tensor.group
            context = TensorContext(tensor.name, info.shape, self.alignment.layers, layer, group, start)
            merged = self.method.combine(pieces, context)
            if "donor_base" in pieces:
                moved += float((pieces["donor"] - pieces["donor_base"]).norm()) ** 2
            if merged is not pieces["vlm"]:
                added += float((merged - pieces["vlm"]).norm()) ** 2
                own = merged.to(own.dtype)
                if not torch.isfinite(own).all():
                    raise NumericalError(f"{tensor.name}: the merged values overflow {info.dtype}; use a smaller scale")
            self.writer.write_at(tensor.name, start, own.reshape(-1))
        return {"added": math.sqrt(added), "task_vector": math.sqrt(moved) if tensor.donor_base else None}

    def _pieces(self, tensor: AlignedTensor) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
        """(first element, the VLM's piece in its dtype, all float32 pieces by checkpoint)."""
        info = self.alignment.vlm.tensors[tensor.name]
        others = {key: getattr(tensor, key) for key in ("donor", "donor_base", "vlm_base")}
        others = {key: source for key, source in others.items() if source is not None}
        if self.method.granularity == "element" and all(source.streamable for source in others.values()):
            names = {"vlm": tensor.name, **{key: source.names[0] for key, source in others.items()}}
            for start in range(0, info.elements, CHUNK):
                raw = {}
                for key, name in names.items():
                    dtype = TORCH_DTYPES[self.readers[key].info(name).dtype]
                    raw[key] = torch.empty(min(CHUNK, info.elements - start), dtype=dtype)
                    self.readers[key].read_into(name, start, raw[key])
                yield start, raw["vlm"], self._checked(tensor, raw)
            return
        raw = {"vlm": self.readers["vlm"].tensor(tensor.name)}
        for key, source in others.items():
            raw[key] = assemble(source, self.readers[key].tensor, info.shape, fill=raw["vlm"])
        yield 0, raw["vlm"], self._checked(tensor, raw)

    def _checked(self, tensor: AlignedTensor, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """Float32 pieces; raises WeightsError naming the tensor and file that is not finite."""
        for key, piece in raw.items():
            if not torch.isfinite(piece).all():
                name = tensor.name if key == "vlm" else getattr(tensor, key).names[0]
                raise WeightsError(f"{name} in {self.readers[key].info(name).file} ({key}): holds NaN or infinity")
        return {key: piece.float() for key, piece in raw.items()}
