"""The record of a merge, tensor by tensor: made from the written tensors, sealed as receipt.json, and read again."""

from __future__ import annotations

import hashlib
import json
import math
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from vlmgraft._version import __version__
from vlmgraft.alignment import AlignedTensor, Alignment
from vlmgraft.checkpoint.digests import RECEIPT, FileReceipt, seal
from vlmgraft.checkpoint.header import TensorSpec
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.merging.plan import sources_of
from vlmgraft.merging.rounding import LEAST_EFFECTIVE, Survival, survival_of
from vlmgraft.methods.base import Method
from vlmgraft.spectral.task_vector import zero_everywhere

FAR = 0.5
"""‖τ‖ / ‖W_vlm‖ from which a merge warns. Measured pairs have 0.007 (a trio of 135 M) and 0.09, at most 0.12 in a layer
(the lab); unrelated matrices of equal norm have 1.41. The limit is four times 0.12 and a third of 1.41."""


@dataclass(frozen=True)
class TensorReceipt:
    """One tensor. added: Frobenius norm of (merged − VLM) before the cast; task_vector: of donor − base. digest: of its
    bytes (see checkpoint/digests.py). effective, noise, changed: of what was added, after the cast (`Survival`).
    clamped: values beyond the dtype that became its largest. nonfinite: values of a copied tensor that are NaN or
    infinite."""

    name: str
    verdict: str
    reason: str
    sources: dict[str, list[str]]
    dtype: str
    shape: list[int]
    digest: str
    added: float = 0.0
    task_vector: float | None = None
    effective: float | None = None
    noise: float | None = None
    changed: float = 0.0
    clamped: int = 0
    nonfinite: int = 0


@dataclass(frozen=True)
class Receipt:
    """What a merge did. peak_memory: of the whole process, bytes. inputs: the input files' fingerprint. digest: of the
    receipt. effective, noise, changed: over all merged tensors (`Survival`). sources: checkpoint → tensor → digest of
    its bytes as they were read, of all tensors that were read whole. Written as receipt.json."""

    method: str
    tensors: tuple[TensorReceipt, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    seconds: float
    peak_memory: int
    files: tuple[FileReceipt, ...]
    inputs: str
    effective: float | None = None
    noise: float | None = None
    changed: float = 0.0
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    digest: str = ""

    @property
    def survival(self) -> Survival:
        """What of the change survived the cast, over all merged tensors."""
        return Survival(self.effective, self.noise, self.changed)


_RECEIPT = TypeAdapter(Receipt)


def receipt_of(
    alignment: Alignment,
    method: Method,
    writer: Writer,
    fill: Callable[[Path, Survival], object] | None,
    versions: Mapping[str, str],
) -> Receipt:
    """The receipt of a merge whose tensors are all written, before it is timed and sealed; also writes the side files.

    fill: writes the side files. versions: of libraries other than torch that took part.
    Raises AlignmentError where the task vector is zero.
    """
    opened = alignment.opened
    rows = tuple(_row(tensor, writer.spec(tensor.name), writer.done[tensor.name]) for tensor in alignment.tensors)
    if "donor_base" in opened and not any(row.task_vector for row in rows):
        raise zero_everywhere(alignment)
    kept = survival_of(
        (row.added, Survival(row.effective, row.noise, row.changed), math.prod(row.shape))
        for row in rows
        if row.verdict == "merged"
    )
    if fill is not None:
        fill(writer.folder, kept)
    far = _far(alignment, rows, [writer.done[row.name].get("weight", 0.0) for row in rows])
    return Receipt(
        method.name,
        rows,
        (*alignment.notes, *method.notes(), *far, *_warning(kept), *_values_noted(rows)),
        {"vlmgraft": __version__, "torch": torch.__version__, **versions},
        0.0,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        writer.files(),
        fingerprint([file for one in opened.values() for file in one.files]),
        **asdict(kept),
        sources=_read_from(method, writer.done.values()),
    )


def _read_from(method: Method, facts: Iterable[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """The digests of the sources: those that the method knows, and those in the facts of every tensor."""
    sources = {key: dict(digests) for key, digests in method.sources_read().items()}
    for of_tensor in facts:
        for key, digests in of_tensor.get("read", {}).items():
            sources.setdefault(key, {}).update(digests)
    return sources


def _values_noted(rows: Sequence[TensorReceipt]) -> list[str]:
    """A note for every tensor with clamped values, then for every tensor with copied NaN or infinite values."""
    beyond = [f"{row.name}: {row.clamped} values clamped to the largest of {row.dtype}" for row in rows if row.clamped]
    copied = [f"{row.name}: {row.nonfinite} values are NaN or infinite, as in the VLM" for row in rows if row.nonfinite]
    return beyond + copied


def _far(alignment: Alignment, rows: Sequence[TensorReceipt], weights: Sequence[float]) -> tuple[str, ...]:
    """A warning if the task vector is so long, against the VLM's weights, that the base is hardly the donor's."""
    weight = math.hypot(*weights)
    ratio = math.hypot(*(row.task_vector or 0.0 for row in rows)) / weight if weight else 0.0
    if ratio < FAR or alignment.donor_base is None:
        return ()
    return (
        f"warning: ‖donor − donor_base‖ is {ratio:.2g} of the VLM's weights; tuning moves them by 0.01 to 0.1, "
        "unrelated models lie 1.4 apart: donor_base is hardly what the donor was tuned from; compare bases with "
        "`vlmgraft inspect --distances`",
    )


def _warning(kept: Survival) -> tuple[str, ...]:
    """A warning if too little of the change survived the cast."""
    if kept.effective is None or kept.effective >= LEAST_EFFECTIVE:
        return ()
    return (
        f"warning: {kept.line()}: rounding to the VLM's dtype lost the rest; write output: {{rounding: stochastic}} "
        "or {dtype: float32}, or a larger scale",
    )


def finished_receipt(out: Path, inputs: Sequence[Path]) -> Receipt | None:
    """The receipt of a merged folder; None if there is none, or if it was made from other input files."""
    try:
        text = (out / RECEIPT).read_bytes()
        receipt = _RECEIPT.validate_json(text, strict=True)
    except (OSError, ValidationError):
        return None
    same = receipt.digest == seal(json.loads(text)) and receipt.inputs == fingerprint(inputs)
    return receipt if same else None


def fingerprint(files: Sequence[Path]) -> str:
    """A hash that changes when a file is replaced. Times are tested for equality, never ordered: clocks jump."""
    stats = [(str(file), file.stat()) for file in files]
    known = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def _row(tensor: AlignedTensor, spec: TensorSpec, facts: dict[str, Any]) -> TensorReceipt:
    names = {key: list(source.names) for key, source in sources_of(tensor).items()}
    known = {
        key: value for key, value in facts.items() if key not in ("read", "weight", "tally")
    }  # digests stand in `sources`
    return TensorReceipt(
        tensor.name, tensor.verdict, tensor.reason, names, dtype=spec.dtype, shape=list(spec.shape), **known
    )
