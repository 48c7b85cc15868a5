"""A merge from open checkpoints to a published folder: passes, stream, receipt."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlmgraft import __version__
from vlmgraft.alignment import AlignedTensor, Alignment
from vlmgraft.checkpoint.digests import RECEIPT, FileReceipt, seal
from vlmgraft.checkpoint.header import TensorInfo
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.checkpoint.shards import TensorSpec
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.errors import AlignmentError
from vlmgraft.merging.engine import Merger
from vlmgraft.merging.passes import MergedPasses
from vlmgraft.merging.pieces import Inputs, Lane
from vlmgraft.merging.plan import check_needs, sources_of
from vlmgraft.methods.base import Method, check_numbers
from vlmgraft.publishing import refuse_output
from vlmgraft.records import write_json
from vlmgraft.spectral.threads import one_core_each

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TensorReceipt:
    """One tensor. added: Frobenius norm of (merged − VLM) before the cast; task_vector: of donor − base. digest: of its
    bytes (see checkpoint/digests.py). clamped: values beyond the dtype that became its largest."""

    name: str
    verdict: str
    reason: str
    sources: dict[str, list[str]]
    dtype: str
    shape: list[int]
    digest: str
    added: float = 0.0
    task_vector: float | None = None
    clamped: int = 0


@dataclass(frozen=True)
class Receipt:
    """What a merge did. peak_memory: of the whole process, bytes. inputs: the input files' fingerprint. digest: of the
    receipt. Written as receipt.json."""

    method: str
    tensors: tuple[TensorReceipt, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    seconds: float
    peak_memory: int
    files: tuple[FileReceipt, ...]
    inputs: str
    digest: str = ""


def merge_tensors(
    alignment: Alignment,
    method: Method,
    out: str | Path,
    *,
    shard_size: int = 5 * 10**9,
    threads: int = 2,
    progress: Progress | None = None,
    fill: Callable[[Path], object] | None = None,
    resume: bool = False,
    clamp: bool = False,
) -> Receipt:
    """Write the merged checkpoint `out`: the VLM's names, dtypes and shapes, and receipt.json.

    fill: writes the side files into the folder that it is called with. clamp: see `Merger`.
    resume: go on with what an interruption, or with
    `resume` any failure but a refusal, left; whoever stops a merge can resume it.

    Raises:
        OutputError: `out` exists or is an input. AlignmentError: a checkpoint that the method needs is missing, or the
            task vector is zero. WeightsError: an input holds NaN or infinity, naming tensor and file. NumericalError:
            overflow on the cast. Nothing is published then and no partial folder stays.
    """
    began = time.perf_counter()
    check_needs(alignment, method)
    check_numbers(method, alignment)
    sources = {key: getattr(alignment, key) for key in ("vlm", "donor", "donor_base", "vlm_base")}
    opened = {key: checkpoint for key, checkpoint in sources.items() if checkpoint is not None}
    refuse_output(Path(out), [checkpoint.path for checkpoint in opened.values()])
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in alignment.vlm.tensors.values()]
    key = _key(alignment, (method, clamp) if clamp else method, shard_size)
    with ExitStack() as stack:
        inputs = Inputs(alignment, {name: stack.enter_context(Reader(one)) for name, one in opened.items()})
        writer = stack.enter_context(Writer(out, specs, shard_size, resume=key, anew=not resume))
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        stack.enter_context(one_core_each())  # our threads share the work; torch's own would get in their way
        for _ in range(threads):
            inputs.lanes.put(Lane(opened))
        if hasattr(method, "prepare"):
            method = method.prepare(MergedPasses(inputs, pool, threads))
        merger = Merger(inputs, method, writer, clamp)
        for name in merger.run(pool, threads):
            if progress is not None:
                progress(len(writer.done), len(specs), name)
        rows = tuple(_row(tensor, inputs.info(tensor), writer.done[tensor.name]) for tensor in alignment.tensors)
        if "donor_base" in opened and not any(row.task_vector for row in rows):
            raise AlignmentError(f"the task vector is zero: {alignment.donor.path} and its base hold the same weights")
        if fill is not None:
            fill(writer.folder)
        versions = {"vlmgraft": __version__, "torch": torch.__version__}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        beyond = [
            f"{row.name}: {row.clamped} values clamped to the largest of {row.dtype}" for row in rows if row.clamped
        ]
        notes = (*alignment.notes, *getattr(method, "notes", tuple)(), *beyond)
        files, made_from = writer.files(), fingerprint([file for one in opened.values() for file in one.files])
        receipt = Receipt(method.name, rows, notes, versions, time.perf_counter() - began, peak, files, made_from)
        receipt = replace(receipt, digest=seal(asdict(receipt)))
        write_json(writer.folder / RECEIPT, asdict(receipt))
    return receipt


def finished_receipt(out: Path, inputs: Sequence[Path]) -> Receipt | None:
    """The receipt of a merged folder, unless there is none or it was made from other input files."""
    try:
        found = json.loads((out / RECEIPT).read_text(encoding="utf-8"))
        if found["digest"] != seal(found) or found["inputs"] != fingerprint(inputs):
            return None
        tensors = tuple(TensorReceipt(**row) for row in found["tensors"])
        files = tuple(FileReceipt(**{**row, "tensors": tuple(row["tensors"])}) for row in found["files"])
        return Receipt(**{**found, "tensors": tensors, "files": files, "notes": tuple(found["notes"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fingerprint(files: Sequence[Path]) -> str:
    """Changes when a file is replaced. Times are compared for being equal, never for order: clocks jump."""
    stats = [(str(file), file.stat()) for file in files]
    known = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def _key(alignment: Alignment, method: object, shard_size: int) -> str:
    """Changes with everything that the merged bytes depend on."""
    opened = [one for one in (alignment.vlm, alignment.donor, alignment.donor_base, alignment.vlm_base) if one]
    made_from = fingerprint([file for checkpoint in opened for file in checkpoint.files])
    return hashlib.sha256(repr((method, made_from, opened, alignment.tensors, shard_size)).encode()).hexdigest()[:16]


def _row(tensor: AlignedTensor, info: TensorInfo, facts: dict[str, Any]) -> TensorReceipt:
    names = {key: list(source.names) for key, source in sources_of(tensor).items()}
    return TensorReceipt(
        tensor.name, tensor.verdict, tensor.reason, names, dtype=info.dtype, shape=list(info.shape), **facts
    )
