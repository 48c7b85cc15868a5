"""The public functions behind the commands: recipe in, finished folders out.

A recipe is resolved once into a job, which is passed to check, decompose, learn and fold. Each arrow leaves files that
can be inspected and resumed from: job → factors/ → gates/ → merged checkpoint with receipt. A checkpoint is read once
by each stage that needs it: donor and base by decompose, the VLM by check, learn and fold. Finished stages are not
repeated. torch is loaded only when work starts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from vlmgraft.checkpoint.hub import cached_folder, is_hub_id
from vlmgraft.checkpoint.packed import without_quantisation
from vlmgraft.errors import InputError, OutputError, RecipeError
from vlmgraft.export.card import REPLAY, copy_side_files, declare_dtype, write_model_card
from vlmgraft.methods.frism import MEMORY_REMEDY, GatedFold, GatedMethod
from vlmgraft.recipe.model import dump_recipe
from vlmgraft.recipe.resolve import (
    Job,
    Plan,
    RecipeSource,
    gated_method,
    inspect,
    pair,
    pairs,
    plan,
    read_recipe,
    resolve,
)
from vlmgraft.recipe.source import read_mapping
from vlmgraft.storage.jsonl import write_json, write_text
from vlmgraft.storage.locks import at_work, locked
from vlmgraft.storage.outputs import free_space, refuse_output, refuse_place
from vlmgraft.storage.portable import portable
from vlmgraft.storage.progress import LogProgress, Progress
from vlmgraft.storage.publish import sweep_folders
from vlmgraft.storage.resources import usable_cores
from vlmgraft.storage.torchrun import rank_and_world

if TYPE_CHECKING:
    from vlmgraft.export.lora import LoraReport
    from vlmgraft.merging import Receipt
    from vlmgraft.merging.rounding import Survival
    from vlmgraft.methods.base import Method
    from vlmgraft.spectral.factor_store import Store
    from vlmgraft.spectral.gates import Gates

__all__ = [
    "Job", "Plan", "RecipeSource", "decompose", "export_front", "export_lora", "gates", "inspect", "merge", "pair",
    "pairs", "plan", "read_recipe", "resolve",
]  # fmt: skip

RECIPE = "recipe.yaml"
MOST_THREADS = 8
"""Most threads of a streamed merge: more would wait for the disk, and each holds ten megabytes."""


def merge(
    recipe: RecipeSource,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    workdir: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Receipt:
    """Merge as the recipe says and publish a finished checkpoint at `out`.

    A FRISM recipe decomposes, learns and folds in one go; `workdir` (default: a hidden folder beside `out`, removed
    after success) keeps factors and gates, and those that it already holds for the same inputs are reused. The gates
    with their log are also in `out`/gates. threads: of the streaming; default: one per core of this process, up to
    eight, or for methods on whole tensors as many as fit into half of the free memory. resume: continue an interrupted
    merge; an `out` that the same recipe finished is left as it is. progress: by default a line in the log of `vlmgraft`
    every 30 seconds.

    Raises:
        RecipeError, CheckpointError, AlignmentError, OutputError: before anything is written; the last also if the disk
            has no room for the result.
        NumericalError: NaN, infinity or overflow, naming the tensor; nothing is published.
    """
    _one_process()
    out = Path(out)
    loaded = read_recipe(recipe, overrides)
    if not resume:  # before anything is downloaded
        refuse_output(out, loaded.models)
    job = resolve(loaded)
    if resume and (receipt := _finished(job, out)):
        return receipt
    work = Path(workdir) if workdir else _workdir(out)
    refuse_output(out, job.folders)
    refuse_place(work, job.folders)
    refuse_place(out, [work / "factors", work / "gates"])
    if not resume and os.access(out.resolve().parent, os.W_OK):  # else the writer reports why not
        free_space(out, sum(tensor.nbytes for tensor in job.vlm.tensors.values()))
    progress = progress or LogProgress()
    with _working(job, out, work, keep=workdir is not None):
        method = _learned(job, work, progress) if isinstance(job.recipe.method, GatedMethod) else job.recipe.method
        return _folded(job, method, out, threads or _threads(job, method), resume, progress)


def _threads(job: Job, method: Method) -> int:
    """One thread per core: at most `MOST_THREADS` to stream chunks; for whole tensors as many as memory allows."""
    if not method.whole_tensors:
        return min(MOST_THREADS, usable_cores())
    from vlmgraft.spectral.threads import workers_for  # loads torch

    return workers_for(max((job.vlm.tensors[tensor.name].elements for tensor in job.alignment.merged), default=1))


def decompose(
    recipe: RecipeSource,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> Store:
    """SVD of the donor's task vector into a factor store at `out`, one file per matrix; further donors' beside it."""
    from vlmgraft.distillation.learn import factors_for

    loaded = read_recipe(recipe, overrides)
    gated_method(loaded)
    if not resume and rank_and_world()[0] == 0:  # no other process writes before this one has joined
        _refuse_store(Path(out), loaded.models)
    job = resolve(loaded, questions=False)
    lower = "write a smaller method.rank, or run it where there is more memory"
    with at_work(out, "decomposing", lower, job.folders):
        return factors_for(job, Path(out), resume=resume, progress=progress or LogProgress())


def _refuse_store(out: Path, models: Sequence[str]) -> None:
    """Raise OutputError, before anything is downloaded, if `out` exists and cannot be checked to belong to this job."""
    from vlmgraft.spectral.factor_store import is_store_file

    refuse_output(out, models, ours=is_store_file)
    if out.is_dir() and any(out.iterdir()):
        for model in models:
            if is_hub_id(model) and cached_folder(model) is None:
                raise OutputError(
                    f"{out}: exists, and {model}, of which its factors would have to be, is not downloaded; resume to "
                    "redo what differs, or choose another folder"
                )


def gates(
    recipe: RecipeSource,
    factors: str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Gates:
    """FRISM's second stage on a factor store: writes the gates folder `out`, or reads it if it is finished."""
    from vlmgraft.distillation.learn import check_factors, check_inputs, gates_for
    from vlmgraft.spectral.factor_store import open_store

    out = Path(out)
    if out.exists() and not (out / "gates.json").is_file():
        raise OutputError(f"{out}: exists already; name another folder, or remove it first")
    job = resolve(recipe, overrides)
    check_inputs(job, out)
    with at_work(out, "learning gates", MEMORY_REMEDY, [*job.folders, factors]), locked(factors, shared=True):
        check_factors(job, Path(factors))
        return gates_for(job, open_store(factors, training=True), out, progress or LogProgress(), replace_others=False)


def _learned(job: Job, work: Path, progress: Progress | None) -> Method:
    """Check, decompose and learn; gives the method with the job's factors and gates, which reads only the VLM."""
    from vlmgraft.distillation.learn import check_inputs, factors_for, gates_for
    from vlmgraft.hf.placement import default_device
    from vlmgraft.spectral.factor_store import open_store

    check_inputs(job, work / "gates")
    store = factors_for(job, work / "factors", resume=True, progress=progress)
    gates = gates_for(job, open_store(work / "factors", training=True), work / "gates", progress)
    device = default_device()
    return job.method.bind(store, gates, device.type if device.type == "cpu" else str(device))


def _keep_gates(gates: Gates, folder: Path) -> None:
    """Save the gates and their log beside the merged weights, without the entry that identifies them in a workdir."""
    from vlmgraft.spectral.gate_store import save_gates

    settings = {key: value for key, value in gates.settings.items() if key != "from"}
    save_gates(replace(gates, settings=settings), folder / "gates")


def _folded(job: Job, method: Method, out: Path, threads: int, resume: bool, progress: Progress | None) -> Receipt:
    """Stream the merged checkpoint to `out`, with its side files."""
    from vlmgraft.merging import merge_tensors

    divergence = method.divergence if isinstance(method, GatedFold) else None

    def add_side_files(folder: Path, survival: Survival) -> None:
        copy_side_files(job.vlm.path, folder)
        if job.vlm.packed:
            write_json(folder / "config.json", without_quantisation(job.vlm.config))
        plain = portable(dump_recipe(job.recipe), out)  # `folder` becomes `out`
        if job.recipe.output.dtype == "float32":
            declare_dtype(folder / "config.json", "float32")
        write_text(folder / RECIPE, REPLAY + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
        if isinstance(method, GatedFold):
            _keep_gates(method.gates, folder)
        write_model_card(folder, plain, job.alignment, [*method.notes(), survival.line()], divergence)

    output = job.recipe.output
    return merge_tensors(
        job.alignment,
        method,
        out,
        shard_size=output.shard_bytes,
        float32=output.dtype == "float32",
        threads=threads,
        progress=progress,
        fill=add_side_files,
        resume=resume,
        clamp=output.overflow == "clamp",
        allow_nonfinite=output.allow_nonfinite,
        seed=output.seed if output.rounding == "stochastic" else None,
    )


@contextmanager
def _working(job: Job, out: Path, work: Path, *, keep: bool) -> Iterator[None]:
    """Lock `out` and the folders in `work`. Unless the user named it (`keep`), `work` is removed after success and when
    inputs are refused."""
    gated = isinstance(job.recipe.method, GatedMethod)
    lower = MEMORY_REMEDY if gated else "whole tensors do not fit; `merge --dry-run` says how much a merge needs"
    with ExitStack() as stack:
        stack.enter_context(at_work(out, "merging", lower))
        for folder in (work / "factors", work / "gates") if gated else ():
            stack.enter_context(locked(folder))
        try:
            yield
        except InputError as error:
            if not keep and not isinstance(error, OutputError):  # with more disk space the next run can resume
                shutil.rmtree(work, ignore_errors=True)
            raise
        if not keep:
            shutil.rmtree(work, ignore_errors=True)


def _one_process() -> None:
    """Raise RecipeError under torchrun."""
    if rank_and_world()[1] > 1:
        raise RecipeError(
            "merge runs in one process: run decompose (--out WORK/factors) and gates (--factors WORK/factors --out "
            "WORK/gates) under torchrun, then merge --workdir WORK without it"
        )


def _finished(job: Job, out: Path) -> Receipt | None:
    """The receipt of `out` if this very merge had finished it before it was killed; removes leftovers."""
    if not out.is_dir():
        return None
    from vlmgraft.merging.receipt import finished_receipt

    files = [file for checkpoint in job.alignment.opened.values() for file in checkpoint.files]
    with locked(out):
        try:
            same = read_mapping(out / RECIPE) == portable(dump_recipe(job.recipe), out)
        except RecipeError:
            return None
        receipt = finished_receipt(out, files) if same else None
        if receipt is not None:
            sweep_folders(out, finished=True)
            shutil.rmtree(_workdir(out), ignore_errors=True)
        return receipt


def _workdir(out: Path) -> Path:
    """Where a merge keeps factors and gates by default."""
    return out.with_name(f".{out.name}.work")


def export_lora(
    gates: str | Path, out: str | Path, *, factors: str | Path, vlm: str | Path, rank: int = 64
) -> LoraReport:
    """Write a gates folder as a LoRA adapter in PEFT's format to the new folder `out`, with its error per matrix.

    Args:
        gates: folder of learned gates. factors: the factors that they were learned on.
        vlm: folder or hub id of the VLM that the adapter applies to; only its config is read.
        rank: of the adapter, at most; it is no more than the factors have directions.
    Raises:
        RecipeError: rank below 1. OutputError: `out` exists. CheckpointError: gates and factors do not belong together.
    """
    from vlmgraft.export.lora import write_lora
    from vlmgraft.spectral.factor_store import open_store
    from vlmgraft.spectral.gate_store import load_gates

    with at_work(out, "exporting", "write a smaller --rank", [gates, factors, vlm]), locked(factors, shared=True):
        return write_lora(vlm, open_store(factors), load_gates(gates), out, rank)


def export_front(
    front: str | Path, out: str | Path, *, factors: str | Path, vlm: str | Path, rank: int = 64
) -> dict[str, LoraReport]:
    """Write a LoRA adapter of one rank for every budget of a front folder to `out`/BUDGET; else as `export_lora`."""
    from vlmgraft.distillation.front import read_path
    from vlmgraft.export.lora import write_loras
    from vlmgraft.spectral.factor_store import open_store

    with at_work(out, "exporting", "write a smaller --rank", [front, factors, vlm]), locked(factors, shared=True):
        return write_loras(vlm, open_store(factors), read_path(front), out, rank)
