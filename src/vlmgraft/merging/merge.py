"""A merge from open checkpoints to a published folder: passes, stream, receipt."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmgraft._version import __version__
from vlmgraft.alignment import AlignedTensor, Alignment
from vlmgraft.checkpoint.digests import RECEIPT, FileReceipt, seal
from vlmgraft.checkpoint.header import TensorSpec
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.errors import NumericalError, VlmgraftError
from vlmgraft.merging.engine import Merger
from vlmgraft.merging.pieces import Inputs, Lane, MergedPasses
from vlmgraft.merging.plan import check_needs, sources_of, written_specs
from vlmgraft.merging.rounding import LEAST_EFFECTIVE, Survival, survival_of
from vlmgraft.methods.base import Method, check_numbers
from vlmgraft.spectral.task_vector import zero_everywhere
from vlmgraft.spectral.threads import one_core_each
from vlmgraft.storage.jsonl import write_json
from vlmgraft.storage.outputs import refuse_output
from vlmgraft.storage.progress import Progress
from vlmgraft.storage.publish import partial_folder

if TYPE_CHECKING:
    from vlmgraft.checkpoint.index import Checkpoint


FAR = 0.5
"""‖τ‖ / ‖W_vlm‖ from which a merge warns. Measured pairs have 0.007 (a trio of 135 M) and 0.09, at most 0.12 in a layer
(the lab); two unrelated matrices of one norm are 1.41 apart. Half is four times the one and a third of the other."""


WORTH_COMPILING = 1 << 27
"""Merged elements in bfloat16 from which loading the pass, half a second, costs less than it saves on two cores."""


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


def merge_tensors(
    alignment: Alignment,
    method: Method,
    out: str | Path,
    *,
    shard_size: int = 5 * 10**9,
    float32: bool = False,
    threads: int = 2,
    progress: Progress | None = None,
    fill: Callable[[Path, Survival], object] | None = None,
    resume: bool = False,
    clamp: bool = False,
    allow_nonfinite: bool = False,
    seed: int | None = None,
) -> Receipt:
    """Write the merged checkpoint `out`: the VLM's names, shapes and dtypes, and receipt.json.

    float32: merged tensors are written in float32 rather than the VLM's dtype. fill: writes the side files into the
    folder that it is called with. clamp, allow_nonfinite, seed: see `Merger`. resume: go on with what an interruption,
    or with `resume` any failure but a refusal, left; whoever stops a merge can resume it.

    Raises:
        OutputError: `out` exists or is an input. AlignmentError: a checkpoint that the method needs is missing, or the
            task vector is zero. WeightsError: an input holds NaN or infinity, naming tensor and file. NumericalError:
            overflow on the cast. Nothing is published then and no partial folder stays.
    """
    began = time.perf_counter()
    check_needs(alignment, method)
    check_numbers(method, alignment)
    opened = alignment.opened
    refuse_output(Path(out), [checkpoint.path for checkpoint in opened.values()])
    specs = written_specs(alignment, float32)
    key = _key(alignment, (method, clamp, allow_nonfinite, seed, float32), shard_size)
    options: dict[str, Any] = {"clamp": clamp, "allow_nonfinite": allow_nonfinite, "seed": seed}

    def attempt(may_guess: bool, key: str) -> Receipt:
        with Writer(out, specs, shard_size, resume=key, anew=not resume) as writer:
            prepared = _merge(alignment, method, writer, threads, progress, may_guess, options)
            for checkpoint in opened.values():
                checkpoint.refuse_changes()
            receipt = _receipt(alignment, prepared, writer, opened, fill)
            receipt = replace(receipt, seconds=time.perf_counter() - began)
            receipt = replace(receipt, digest=seal(asdict(receipt)))
            write_json(writer.folder / RECEIPT, asdict(receipt))
        return receipt

    exact = key + "-exact"
    if not (resume and partial_folder(Path(out), exact).exists()):
        with suppress(MisjudgedError):
            return attempt(True, key)
    return attempt(False, exact)


def _merge(
    alignment: Alignment,
    method: Method,
    writer: Writer,
    threads: int,
    progress: Progress | None,
    may_guess: bool,
    options: Mapping[str, Any],
) -> Method:
    """Write all tensors; the method as it was prepared. options: of `Merger`. Raises MisjudgedError."""
    with ExitStack() as stack:
        read = alignment.opened if method.reads_sources else {"vlm": alignment.vlm}
        inputs = Inputs(alignment, {name: stack.enter_context(Reader(one)) for name, one in read.items()})
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        stack.enter_context(one_core_each())  # our threads share the work; torch's own would get in their way
        for _ in range(threads):
            inputs.lanes.put(Lane(read))
        prepared = method.prepare(MergedPasses(inputs, pool, threads, may_guess))
        merger = Merger(inputs, prepared, writer, **options, compiled=bool(_numba(alignment, prepared)))
        try:
            for name in merger.run(pool, threads):
                if progress is not None:
                    progress(len(writer.done), len(alignment.tensors), name)
        except NumericalError as error:
            if prepared.guessed:  # the right thresholds may not overflow
                raise MisjudgedError(str(error)) from error
            raise
        merged = [tensor.name for tensor in alignment.merged if inputs.info(tensor).elements]
        if prepared.guessed and not prepared.bears_out([writer.done[name].get("tally") for name in merged]):
            raise MisjudgedError(f"{writer.out}: what {method.name} guessed is not so")
    return prepared


def _numba(alignment: Alignment, method: Method) -> dict[str, str]:
    """numba's version where it works, and a merge is large enough to load the compiled pass (half a second)."""
    merged = [alignment.vlm.tensors[tensor.name] for tensor in alignment.merged]
    elements = sum(info.elements for info in merged if info.dtype == "BF16")
    if elements < WORTH_COMPILING or type(method).fused is Method.fused:
        return {}
    return _compiled_by()


@cache
def _compiled_by() -> dict[str, str]:
    """numba's version where it is installed and works; a line in the log where it does not: torch merges then."""
    try:
        if find_spec("numba") is None:
            return {}
        from vlmgraft.merging.compiled import FORMS, VERSION, is_torch

        right = [is_torch(form) for form in FORMS]  # here, where whatever they raise is caught
        return {"numba": VERSION} if any(right) else {}
    except Exception as error:  # noqa: BLE001  (of whatever a library, its cache or a full disk may raise)
        logging.getLogger("vlmgraft").warning("numba does not work here (%r): merging in torch", error)
        return {}


class MisjudgedError(VlmgraftError):
    """What a method guessed is not so."""


def _receipt(
    alignment: Alignment,
    method: Method,
    writer: Writer,
    opened: Mapping[str, Checkpoint],
    fill: Callable[[Path, Survival], object] | None,
) -> Receipt:
    """What a merge did whose tensors are all written, before its time is known and it is sealed; adds the side files.

    Raises AlignmentError where the task vector is zero.
    """
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
        {"vlmgraft": __version__, "torch": torch.__version__, **_numba(alignment, method)},
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
    """A note for every tensor with clamped values, then for every one with copied values that are not finite."""
    beyond = [f"{row.name}: {row.clamped} values clamped to the largest of {row.dtype}" for row in rows if row.clamped]
    copied = [f"{row.name}: {row.nonfinite} values are NaN or infinite, as in the VLM" for row in rows if row.nonfinite]
    return beyond + copied


def _far(alignment: Alignment, rows: Sequence[TensorReceipt], weights: Sequence[float]) -> tuple[str, ...]:
    """A note where the task vector is so long, against the VLM's weights, that the base is hardly the donor's."""
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
    """A note where too little of the change survived the cast."""
    if kept.effective is None or kept.effective >= LEAST_EFFECTIVE:
        return ()
    return (
        f"warning: {kept.line()}: rounding to the VLM's dtype lost the rest; write output: {{rounding: stochastic}} "
        "or {dtype: float32}, or a larger scale",
    )


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
    opened = list(alignment.opened.values())
    made_from = fingerprint([file for checkpoint in opened for file in checkpoint.files])
    return hashlib.sha256(repr((method, made_from, opened, alignment.tensors, shard_size)).encode()).hexdigest()[:16]


def _row(tensor: AlignedTensor, spec: TensorSpec, facts: dict[str, Any]) -> TensorReceipt:
    names = {key: list(source.names) for key, source in sources_of(tensor).items()}
    known = {
        key: value for key, value in facts.items() if key not in ("read", "weight", "tally")
    }  # digests stand in `sources`
    return TensorReceipt(
        tensor.name, tensor.verdict, tensor.reason, names, dtype=spec.dtype, shape=list(spec.shape), **known
    )
