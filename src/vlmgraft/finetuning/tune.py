"""`vlmgraft tune`: supervised fine-tuning of a VLM on traces, with DRIFT's prior on gradients, to a finished folder.

The trainer keeps its checkpoints in a hidden folder beside the output, and can resume from them; the finished folder
appears by one rename. It holds the VLM's tensors under their names, shapes and dtypes (or the LoRA adapter), its
side files, `recipe.yaml`, `training.jsonl`, `drift.jsonl`, and `receipt.json` with a verdict for every tensor.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.digests import folder_digest
from vlmgraft.checkpoint.files import INDEX
from vlmgraft.checkpoint.hub import check_access
from vlmgraft.checkpoint.index import Checkpoint, open_checkpoint
from vlmgraft.data.traces import Traces, load_traces
from vlmgraft.errors import OutputError, RecipeError
from vlmgraft.finetuning.callback import LOG, DriftCallback, refuse_deepspeed
from vlmgraft.finetuning.delta import filtered_prior, make_prior, shares_of
from vlmgraft.finetuning.output import CONTENTS, RECIPE, Tuned, finished, publish
from vlmgraft.finetuning.prior import Prior, PushRule
from vlmgraft.finetuning.push import check_places
from vlmgraft.finetuning.trainer import (
    LogWhenSaving,
    TellProgress,
    add_tokens,
    build_trainer,
    freeze_vision,
    lora_config,
    trainer_arguments,
    whole_log,
)
from vlmgraft.hf.models import empty_vlm, load_processor, load_vlm
from vlmgraft.hf.placement import threads_of
from vlmgraft.recipe.tune import TuneRecipe, load_tune_recipe, save_tune_recipe
from vlmgraft.spectral.factor_store import FactorStore
from vlmgraft.storage.files import make_folder
from vlmgraft.storage.jsonl import read_json, read_rows, write_json, write_rows
from vlmgraft.storage.locks import at_work
from vlmgraft.storage.outputs import refuse_output
from vlmgraft.storage.progress import Progress
from vlmgraft.storage.publish import sweep_folders

LOWER = "lower train.per_device_train_batch_size, or write train.gradient_checkpointing: true, or lora"


def tune(
    recipe: str | Path | Mapping[str, Any] | TuneRecipe,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> Tuned:
    """Fine-tune as the recipe says and publish the result at `out`; under torchrun every process calls this.

    Args:
        resume: continue from the last checkpoint of an interrupted run of the same recipe.
        progress: by default a line in the log of `vlmgraft` every 30 seconds.
    Raises:
        RecipeError, DataError, CheckpointError, AlignmentError, OutputError: before anything is trained.
        NumericalError: a gradient became NaN or infinite (names the tensor); nothing is published.
    """
    recipe, out = load_tune_recipe(recipe, overrides), Path(out)
    if unused := recipe.prior.unused():
        logging.getLogger("vlmgraft").warning("prior.mode none: %s are not used", ", ".join(unused))
    _refuse_early(recipe, out, resume)
    vlm = open_checkpoint(recipe.vlm)
    sources = (vlm.path, recipe.donor, recipe.donor_base, recipe.prior.gates, recipe.prior.factors)
    with at_work(out, "fine-tuning", LOWER, [source for source in sources if source is not None]):
        inputs = _read_inputs(recipe, vlm)
        if resume and (tuned := finished(recipe, vlm, out, inputs.contents)):
            sweep_folders(out, finished=True)  # left by a run that was killed after the rename
            shutil.rmtree(_work(out), ignore_errors=True)
            return tuned
        refuse_output(out, [vlm.path])
        return _tune(recipe, vlm, out, inputs, resume, progress)


def _refuse_early(recipe: TuneRecipe, out: Path, resume: bool) -> None:
    """Raise the errors that a recipe and the hub's first responses show, before anything is downloaded."""
    models = [recipe.vlm]
    if recipe.prior.mode != "none":
        refuse_deepspeed(recipe.train.get("deepspeed"))
        models += [model for model in (recipe.donor, recipe.donor_base) if model]
    if not resume:
        refuse_output(out, models)
    check_access(models)


@dataclass(frozen=True)
class _Inputs:
    """The traces, and digests of everything that the recipe names by path: a resumed run must find them unchanged."""

    train: Traces
    validation: Traces | None
    contents: dict[str, str | None]


def _read_inputs(recipe: TuneRecipe, vlm: Checkpoint) -> _Inputs:
    data, prior = recipe.data, recipe.prior
    train = load_traces(data.train, columns=data.columns, limit=data.limit)
    validation = load_traces(data.validation, columns=data.columns) if data.validation else None
    models: dict[str, Any] = {"vlm": vlm.path}
    if prior.mode != "none":
        models |= {"donor": recipe.donor, "donor_base": recipe.donor_base, "gates": prior.gates}
    contents = {name: folder_digest(model) if model else None for name, model in models.items()}
    contents |= {"train": train.digest, "validation": validation.digest if validation else None}
    return _Inputs(train, validation, contents)


def _tune(
    recipe: TuneRecipe, vlm: Checkpoint, out: Path, inputs: _Inputs, resume: bool, progress: Progress | None
) -> Tuned:
    """Train in the work folder beside `out`, from its last checkpoint if there is one to resume, and publish."""
    work = _work(out)
    arguments = trainer_arguments(work / "trainer", recipe.train)
    prior = _prior(recipe, vlm)
    checkpoint = _last_checkpoint(recipe, inputs.contents, work, resume, main=arguments.process_index == 0)
    whole = checkpoint is not None and _has_weights(checkpoint)
    source = checkpoint if checkpoint is not None and whole else vlm.path
    model, processor = load_vlm(source, getattr(torch, recipe.dtype)), load_processor(vlm.path)
    added = add_tokens(model, processor, recipe.data.add_tokens) if recipe.data.add_tokens else 0
    if recipe.freeze_vision:
        freeze_vision(model)
    drift = DriftCallback(prior, when=recipe.prior.when, log=work / LOG) if prior else None
    lora = _lora(recipe, model, added)
    more: dict[str, Any] = {"validation": inputs.validation, "drift": drift, "lora": lora}
    trainer = build_trainer(model, processor, inputs.train, arguments, **more)
    if whole:
        trainer._load_from_checkpoint = lambda *_, **__: None  # it would look for module names, which are not there
    trainer.add_callback(LogWhenSaving(trainer))
    trainer.add_callback(TellProgress(trainer, progress))
    with threads_of(model):
        trainer.train(resume_from_checkpoint=checkpoint)
    verdicts = drift.bound.verdicts if drift is not None and drift.bound is not None else ()
    log = whole_log(trainer.state.log_history)
    tuned = Tuned(out, trainer.state.global_step, log[-1]["train_loss"], verdicts, log)
    _save(trainer, recipe, work / "saved")
    if trainer.is_world_process_zero():
        del trainer, model
        gc.collect()
        publish(recipe, vlm, work, tuned, processor if added else None, prior.sources if prior else {})
        shutil.rmtree(work)
    return tuned


def _work(out: Path) -> Path:
    return out.with_name(f".{out.name}.tune")


def _prior(recipe: TuneRecipe, vlm: Checkpoint) -> Prior | None:
    options = recipe.prior
    if options.mode == "none" or recipe.donor is None:
        return None
    base = open_checkpoint(recipe.donor_base) if recipe.donor_base else None
    alignment: Alignment = align(
        vlm, open_checkpoint(recipe.donor), base, modules=tuple(options.modules), layers=options.layers
    )
    rule = PushRule(options.mode, options.strength, options.schedule, options.rescale)
    shares = shares_of(options.modules)
    if options.gates:
        store = FactorStore(options.factors or Path(options.gates).parent / "factors")
        return filtered_prior(alignment, store, options.gates, rule, shares=shares, store=options.store)
    check_places(empty_vlm(vlm.path), alignment)
    return make_prior(alignment, rule, minus=options.delta, shares=shares, store=options.store)


def _last_checkpoint(
    recipe: TuneRecipe, contents: Mapping[str, str | None], work: Path, resume: bool, *, main: bool
) -> str | None:
    """The checkpoint to resume from; prepares the work folder. Raises OutputError if another recipe left the folder, or
    the same with other contents of its models or traces."""
    note = work / RECIPE
    if resume and note.is_file():
        if load_tune_recipe(note) != recipe:
            raise OutputError(f"{work}: was left by another recipe; remove it, or run without --resume")
        known = read_json(work / CONTENTS) if (work / CONTENTS).is_file() else {}
        changed = [name for name in contents if known.get(name) != contents[name]]
        if changed:
            raise OutputError(
                f"{work}: was left by a run with other contents of {', '.join(changed)}; bring them back, or run "
                "without --resume"
            )
        last = max(filter(None, map(_step_of, (work / "trainer").glob("checkpoint-*"))), default=0)
        if main:
            _remove_later(work, last)
        return str(work / "trainer" / f"checkpoint-{last}") if last else None
    if main:
        shutil.rmtree(work, ignore_errors=True)
        make_folder(work)
        write_json(work / CONTENTS, contents)
        save_tune_recipe(recipe, note)
    return None


def _has_weights(checkpoint: str) -> bool:
    """Whether a checkpoint holds the whole model under its names on disk, which are not the module's names.

    transformers 5.23 resumes by module names alone: for a VLM whose names differ it finds nothing, warns, and continues
    with its current weights. Therefore the model is loaded from the checkpoint; adapters and FSDP states are not.
    """
    return any((Path(checkpoint) / name).is_file() for name in ("model.safetensors", INDEX))


def _step_of(checkpoint: Path) -> int:
    """The step of a complete checkpoint, 0 of any other: the trainer's state is the last file to be written.

    transformers' own `get_last_checkpoint` accepts an incomplete checkpoint of a killed run, and fails on it.
    """
    try:
        step = int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return step if checkpoint.name == f"checkpoint-{step}" else 0


def _remove_later(work: Path, step: int) -> None:
    """Remove incomplete checkpoints, saved weights, and log rows of steps that will be repeated."""
    for checkpoint in (work / "trainer").glob("checkpoint-*"):
        if not _step_of(checkpoint):
            shutil.rmtree(checkpoint)
    for folder in ("saved", "side"):
        shutil.rmtree(work / folder, ignore_errors=True)
    log = work / LOG
    if log.is_file():
        write_rows(log, [row for row in read_rows(log) if row["step"] <= step])


def _lora(recipe: TuneRecipe, model: Any, added: int) -> Any:
    if recipe.lora is None:
        return None
    if added and not recipe.lora.get("modules_to_save"):
        raise RecipeError(
            f"data.add_tokens: {added} tokens are new, and an adapter does not train their embeddings; write "
            "lora: {modules_to_save: [embed_tokens, lm_head]}, or train all weights"
        )
    return lora_config(recipe.lora, model)


def _save(trainer: Any, recipe: TuneRecipe, folder: Path) -> None:
    """Save the trained weights as the trainer does; every process takes part."""
    if not recipe.merge_adapter:
        trainer.save_model(str(folder))
    elif trainer.is_world_process_zero():
        trainer.model.merge_and_unload().save_pretrained(folder)
