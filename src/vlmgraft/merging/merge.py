"""A merge from open checkpoints to a published folder: passes, stream, receipt."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmgraft.alignment import Alignment
from vlmgraft.checkpoint.digests import RECEIPT, seal
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.errors import NumericalError, VlmgraftError
from vlmgraft.merging.engine import Merger
from vlmgraft.merging.pieces import Inputs, MergedPasses, Workspace
from vlmgraft.merging.plan import check_needs, written_specs
from vlmgraft.merging.receipt import Receipt, fingerprint, receipt_of
from vlmgraft.merging.rounding import Survival
from vlmgraft.methods.base import Method, check_numbers
from vlmgraft.spectral.threads import one_core_each
from vlmgraft.storage.jsonl import write_json
from vlmgraft.storage.outputs import refuse_output
from vlmgraft.storage.progress import Progress
from vlmgraft.storage.publish import partial_folder

WORTH_COMPILING = 1 << 27
"""Merged bfloat16 elements from which the compiled pass saves more time on two cores than loading it takes (0.5 s)."""


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

    float32: merged tensors are written in float32. fill: writes the side files into a given folder. clamp,
    allow_nonfinite, seed: see `Merger`. resume: continue an interrupted merge. What is written is then also kept after
    an error, unless the inputs were refused; after an interruption by the user it is always kept.

    Raises:
        OutputError: `out` exists or is an input. AlignmentError: a checkpoint that the method needs is missing, or the
            task vector is zero. WeightsError: an input holds NaN or infinity, naming tensor and file. NumericalError:
            overflow on the cast. Nothing is published then, and without `resume` no partial folder stays.
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
            receipt = receipt_of(alignment, prepared, writer, fill, _numba(alignment, prepared))
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
    """Write all tensors; returns the prepared method. options: of `Merger`. Raises MisjudgedError."""
    with ExitStack() as stack:
        read = alignment.opened if method.reads_sources else {"vlm": alignment.vlm}
        inputs = Inputs(alignment, {name: stack.enter_context(Reader(one)) for name, one in read.items()})
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        stack.enter_context(one_core_each())  # our threads share the work; torch's own would compete with them
        for _ in range(threads):
            inputs.workspaces.put(Workspace(read))
        prepared = method.prepare(MergedPasses(inputs, pool, threads, may_guess))
        merger = Merger(inputs, prepared, writer, **options, compiled=bool(_numba(alignment, prepared)))
        try:
            for name in merger.run(pool, threads):
                if progress is not None:
                    progress(len(writer.done), len(alignment.tensors), name)
        except NumericalError as error:
            if prepared.guessed:  # the exact thresholds may not overflow
                raise MisjudgedError(str(error)) from error
            raise
        merged = [tensor.name for tensor in alignment.merged if inputs.info(tensor).elements]
        if prepared.guessed and not prepared.bears_out([writer.done[name].get("tally") for name in merged]):
            raise MisjudgedError(f"{writer.out}: what {method.name} guessed is not so")
    return prepared


def _numba(alignment: Alignment, method: Method) -> dict[str, str]:
    """numba's version if it works and the merge is large enough to load the compiled pass; else empty."""
    merged = [alignment.vlm.tensors[tensor.name] for tensor in alignment.merged]
    elements = sum(info.elements for info in merged if info.dtype == "BF16")
    if elements < WORTH_COMPILING or type(method).fused is Method.fused:
        return {}
    return _compiled_by()


@cache
def _compiled_by() -> dict[str, str]:
    """numba's version if it is installed and works; else empty, and torch merges. A failure is logged."""
    try:
        if find_spec("numba") is None:
            return {}
        from vlmgraft.merging.compiled import FORMS, VERSION, is_torch

        right = [is_torch(form) for form in FORMS]  # here, where all exceptions are caught
        return {"numba": VERSION} if any(right) else {}
    except Exception as error:  # noqa: BLE001  (a library, its cache or a full disk may raise anything)
        logging.getLogger("vlmgraft").warning("numba does not work here (%r): merging in torch", error)
        return {}


class MisjudgedError(VlmgraftError):
    """A method's guess proved wrong during the merge."""


def _key(alignment: Alignment, method: object, shard_size: int) -> str:
    """Resume key: a hash of everything that the merged bytes depend on."""
    opened = list(alignment.opened.values())
    made_from = fingerprint([file for checkpoint in opened for file in checkpoint.files])
    return hashlib.sha256(repr((method, made_from, opened, alignment.tensors, shard_size)).encode()).hexdigest()[:16]
