"""The public functions behind the commands: recipe in, finished folders out.

Each arrow leaves files that can be looked at and resumed from:
recipe → alignment → factors/ → gates/ → merged checkpoint with receipt. torch is loaded when work starts, not before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmgraft.alignment import Alignment
from vlmgraft.card import push_to_hub, side_files, write_model_card
from vlmgraft.errors import InputError, OutputError, RecipeError
from vlmgraft.locks import at_work, locked
from vlmgraft.methods.base import check_numbers
from vlmgraft.planning import Plan, RecipeSource, inspect, pair, pairs, plan, read_recipe
from vlmgraft.publishing import refuse_output, sweep_folders
from vlmgraft.recipe import Recipe, dump_recipe, load_recipe, save_recipe

if TYPE_CHECKING:
    from vlmgraft.merging import Receipt
    from vlmgraft.spectral.donors import JoinedStore
    from vlmgraft.spectral.factors import FactorStore
    from vlmgraft.spectral.gates import Gates

__all__ = [
    "Plan", "RecipeSource", "decompose", "export", "gates", "inspect", "merge", "pair", "pairs", "plan", "read_recipe"
]  # fmt: skip

Progress = Callable[[int, int, str], None]
RECIPE = "recipe.yaml"
LOWER = "lower method.calibration.batch_size, method.calibration.max_new_tokens or method.rank"


def merge(
    recipe: RecipeSource,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    workdir: str | Path | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> Receipt:
    """Merge as the recipe says and publish a finished checkpoint at `out`.

    A FRISM recipe decomposes, learns and folds in one go; `workdir` (default: a hidden folder beside `out`, removed
    after success) keeps factors and gates, and what it already holds for the same inputs is not computed again.
    resume: go on with what an interruption left; an `out` that the same recipe finished is left as it is.

    Raises:
        RecipeError, CheckpointError, AlignmentError, OutputError: before anything is written.
        NumericalError: NaN, infinity or overflow, naming the tensor; nothing is published.
    """
    recipe, out = read_recipe(recipe, overrides), Path(out)
    from vlmgraft.merging import merge_tensors

    _one_process()
    alignments = pairs(recipe)
    alignment = alignments[0]
    check_numbers(recipe.method, alignment)
    opened = [o for o in (alignment.vlm, alignment.donor, alignment.donor_base, alignment.vlm_base) if o is not None]
    if resume and out.is_dir():
        with locked(out):
            if receipt := _finished(recipe, out, [file for source in opened for file in source.files]):
                return receipt
    refuse_output(out, [source.path for source in opened])
    gated = hasattr(recipe.method, "bind")
    work = Path(workdir) if workdir else _workdir(out)
    lower = LOWER if gated else "whole tensors do not fit; `merge --dry-run` says how much a merge needs"
    with ExitStack() as stack:
        stack.enter_context(at_work(out, "merging", lower))
        for folder in (work / "factors", work / "gates") if gated else ():
            stack.enter_context(locked(folder))
        try:
            method = _bound(recipe, alignments, work, progress)
            receipt = merge_tensors(
                alignment,
                method,
                out,
                shard_size=recipe.output.shard_bytes,
                threads=threads,
                progress=progress,
                fill=lambda folder: _add_side_files(folder, recipe, alignment),
                resume=resume,
                clamp=recipe.output.overflow == "clamp",
            )
        except InputError as error:
            if workdir is None and not isinstance(error, OutputError):  # with more room the next run goes on
                shutil.rmtree(work, ignore_errors=True)
            raise
        if workdir is None:
            shutil.rmtree(work, ignore_errors=True)
    return receipt


def _one_process() -> None:
    """Raise RecipeError under torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            "merge runs in one process: run decompose (--out WORK/factors) and gates (--factors WORK/factors --out "
            "WORK/gates) under torchrun, then merge --workdir WORK without it"
        )


def _add_side_files(folder: Path, recipe: Recipe, alignment: Alignment) -> None:
    """The VLM's own side files, the recipe that replays the merge, and a model card."""
    for file in side_files(alignment.vlm.path):
        shutil.copyfile(file, folder / file.name)
    save_recipe(recipe, folder / RECIPE)
    write_model_card(folder, dump_recipe(recipe), alignment)


def _finished(recipe: Recipe, out: Path, inputs: Sequence[Path]) -> Receipt | None:
    """The receipt of an `out` that this very merge finished, if it was killed after that; removes what it left."""
    from vlmgraft.merging.stream import finished_receipt

    try:
        receipt = finished_receipt(out, inputs) if load_recipe(out / RECIPE) == recipe else None
    except RecipeError:
        return None
    if receipt is not None:
        sweep_folders(out, finished=True)
        shutil.rmtree(_workdir(out), ignore_errors=True)
    return receipt


def _workdir(out: Path) -> Path:
    """Where a merge keeps factors and gates if it is not told."""
    return out.with_name(f".{out.name}.work")


def _bound(recipe: Recipe, alignments: Sequence[Alignment], work: Path, progress: Progress | None) -> Any:
    """The recipe's method, ready to merge: with factors and gates if it has them."""
    if getattr(recipe.method, "bind", None) is None:
        return recipe.method
    from vlmgraft.learning import check_inputs, factors_for, gates_for
    from vlmgraft.spectral.donors import open_store

    check_inputs(recipe, alignments)
    store = factors_for(recipe, alignments, work / "factors", resume=True, progress=progress)
    light = open_store(work / "factors", training=True)
    return recipe.method.bind(store, gates_for(recipe, alignments, light, work / "gates", progress))


def decompose(
    recipe: RecipeSource,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> FactorStore | JoinedStore:
    """SVD of the donor's task vector into a factor store at `out`, one file per matrix; further donors' beside it."""
    from vlmgraft.learning import factors_for

    recipe = read_recipe(recipe, overrides)
    alignments = pairs(recipe)
    with at_work(out, "decomposing", "write a smaller method.rank, or run it where there is more memory"):
        return factors_for(recipe, alignments, Path(out), resume=resume, progress=progress)


def gates(
    recipe: RecipeSource,
    factors: str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Gates:
    """FRISM's second stage on a factor store; writes the gates folder `out`, or finds it finished."""
    from vlmgraft.learning import check_factors, check_questions, gates_for
    from vlmgraft.spectral.donors import open_store
    from vlmgraft.spectral.gates import unfinished

    recipe = read_recipe(recipe, overrides)
    if Path(out).exists() and not (unfinished(Path(out)) or (Path(out) / "gates.json").is_file()):
        raise OutputError(f"{out}: exists already; name another folder, or remove it first")
    alignments = pairs(recipe)
    check_questions(recipe, alignments)
    with at_work(out, "learning gates", LOWER), locked(factors, shared=True):
        check_factors(recipe, alignments, Path(factors))
        store = open_store(factors, training=True)
        return gates_for(recipe, alignments, store, Path(out), progress, replace_others=False)


def export(
    source: str | Path,
    to: Literal["lora", "hub"],
    *,
    out: str | Path | None = None,
    factors: str | Path | None = None,
    vlm: str | None = None,
    rank: int = 64,
    name: str | None = None,
    private: bool = True,
) -> dict[str, Any]:
    """A merged folder to the hub, or a gates folder as a LoRA adapter in PEFT's format with its error per matrix.

    Args:
        source: a merged folder (hub) or a gates folder (lora).
        out: folder of the adapter.
        factors: factors of the gates, for an adapter.
        vlm: the VLM that the adapter applies to.
        rank: of the adapter.
        name: organisation/name on the hub.
        private: others cannot see it there.
    Raises:
        RecipeError: an argument is missing. CheckpointError, OutputError: as the parts say.
    """
    if to == "hub":
        if name is None:
            raise RecipeError("export --to hub: give --name organisation/name")
        return {"address": push_to_hub(Path(source), name, private=private)}
    if not (out and factors and vlm):
        raise RecipeError("export --to lora: give --out, --factors (of `decompose` or the workdir) and --vlm")
    from vlmgraft.lora import export_lora
    from vlmgraft.spectral.donors import open_store
    from vlmgraft.spectral.gates import load_gates

    with at_work(out, "exporting", "write a smaller --rank"), locked(factors, shared=True):
        return asdict(export_lora(vlm, open_store(factors), load_gates(source), out, rank))
