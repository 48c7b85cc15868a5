"""`vlmgraft tune`: supervised fine-tuning of a VLM on traces, with DRIFT's prior on gradients, to a finished folder.

The trainer works in a hidden folder beside the output, with its checkpoints, and can go on from there; the finished
folder appears by one rename. It holds the VLM's tensors under their names, shapes and dtypes (or the LoRA adapter), its
side files, `recipe.yaml`, `training.jsonl`, `drift.jsonl`, and `receipt.json` with a verdict for every tensor.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vlmgraft import __version__
from vlmgraft.alignment import Alignment, align
from vlmgraft.card import side_files
from vlmgraft.checkpoint.index import INDEX, Checkpoint, open_checkpoint
from vlmgraft.checkpoint.reader import TORCH_DTYPES, Reader
from vlmgraft.checkpoint.shards import TensorSpec
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.errors import NumericalError, OutputError, RecipeError
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.locks import at_work
from vlmgraft.publishing import refuse_output
from vlmgraft.recipe.tune import TuneRecipe, dump_tune_recipe, load_tune_recipe, save_tune_recipe
from vlmgraft.records import read_rows, write_json, write_rows, write_text
from vlmgraft.spectral.factors import FactorStore
from vlmgraft.training.drift_callback import LOG, DriftCallback
from vlmgraft.training.prior import PushRule
from vlmgraft.training.prior_delta import Prior, Verdict, filtered_prior, make_prior
from vlmgraft.training.sft import add_tokens, build_trainer, freeze_vision, lora_config, trainer_arguments
from vlmgraft.training.sft_data import load_traces

SHARD = 5 * 10**9
LOWER = "lower train.per_device_train_batch_size, or write train.gradient_checkpointing: true, or lora"


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuning left. verdicts: what the prior did with each tensor; log: the trainer's rows."""

    folder: Path
    steps: int
    loss: float
    verdicts: tuple[Verdict, ...]
    log: tuple[Mapping[str, Any], ...]


def tune(
    recipe: str | Path | Mapping[str, Any] | TuneRecipe,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
) -> Tuned:
    """Fine-tune as the recipe says and publish the result at `out`; under torchrun every process calls this.

    Args:
        resume: go on from the last checkpoint that an interrupted run of the same recipe left.
    Raises:
        RecipeError, DataError, CheckpointError, AlignmentError, OutputError: before anything is trained.
        NumericalError: a gradient became NaN or infinite (names the tensor); nothing is published.
    """
    recipe, out = load_tune_recipe(recipe, overrides), Path(out)
    vlm = open_checkpoint(recipe.vlm)
    refuse_output(out, [vlm.path])
    with at_work(out, "fine-tuning", LOWER):
        return _tune(recipe, vlm, out, resume)


def _tune(recipe: TuneRecipe, vlm: Checkpoint, out: Path, resume: bool) -> Tuned:
    """Train in the work folder beside `out`, from its last checkpoint if there is one to resume, and publish."""
    work = out.with_name(f".{out.name}.tune")
    arguments = trainer_arguments(work / "trainer", recipe.train)
    data = recipe.data
    train = load_traces(data.train, columns=data.columns, limit=data.limit)
    validation = load_traces(data.validation, columns=data.columns) if data.validation else None
    prior = _prior(recipe, vlm)
    checkpoint = _last_checkpoint(recipe, work, resume, main=arguments.process_index == 0)
    whole = checkpoint is not None and _has_weights(checkpoint)
    source = checkpoint if checkpoint is not None and whole else vlm.path
    model, processor = load_vlm(source, getattr(torch, recipe.dtype)), load_processor(vlm.path)
    added = add_tokens(model, processor, data.add_tokens) if data.add_tokens else 0
    if recipe.freeze_vision:
        freeze_vision(model)
    drift = DriftCallback(prior, when=recipe.prior.when, log=work / LOG) if prior else None
    lora = _lora(recipe, model, added)
    trainer = build_trainer(model, processor, train, arguments, validation=validation, drift=drift, lora=lora)
    if whole:
        trainer._load_from_checkpoint = lambda *_, **__: None  # it would look for module names, and find none
    trainer.train(resume_from_checkpoint=checkpoint)
    verdicts = drift.bound.verdicts if drift is not None and drift.bound is not None else ()
    log = tuple(trainer.state.log_history)
    tuned = Tuned(out, trainer.state.global_step, log[-1].get("train_loss", float("nan")), verdicts, log)
    _save(trainer, recipe, work / "saved")
    if trainer.is_world_process_zero():
        del trainer, model
        gc.collect()
        _publish(recipe, vlm, work, tuned, processor if added else None)
    return tuned


def _prior(recipe: TuneRecipe, vlm: Checkpoint) -> Prior | None:
    """The prior of the recipe, or None for plain fine-tuning."""
    options = recipe.prior
    if options.mode == "none" or recipe.donor is None:
        return None
    base = open_checkpoint(recipe.donor_base) if recipe.donor_base else None
    alignment: Alignment = align(
        vlm, open_checkpoint(recipe.donor), base, modules=options.modules, layers=options.layers
    )
    rule = PushRule(options.mode, options.strength, options.schedule, options.rescale)
    if options.gates:
        store = FactorStore(options.factors or Path(options.gates).parent / "factors")
        return filtered_prior(alignment, store, options.gates, rule, store=options.store)
    return make_prior(alignment, rule, minus=options.delta, store=options.store)


def _last_checkpoint(recipe: TuneRecipe, work: Path, resume: bool, *, main: bool) -> str | None:
    """The checkpoint to go on from; prepares the work folder. Raises OutputError when another recipe left it."""
    from transformers.trainer_utils import get_last_checkpoint

    note = work / "recipe.yaml"
    if resume and note.is_file():
        if load_tune_recipe(note) != recipe:
            raise OutputError(f"{work}: was left by another recipe; remove it, or run without --resume")
        folder = work / "trainer"
        found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if found is not None and main:
            _forget_later(work / LOG, int(found.rsplit("-", 1)[1]))
        return found
    if main:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        save_tune_recipe(recipe, note)
    return None


def _has_weights(checkpoint: str) -> bool:
    """Whether a checkpoint holds the whole model under its names on disk, which are not the module's names.

    transformers 5.23 resumes by module names alone: of a VLM whose names differ it finds nothing, warns, and goes on
    from the weights it has. So they are loaded from there in the first place; adapters and FSDP states are left to it.
    """
    return any((Path(checkpoint) / name).is_file() for name in ("model.safetensors", INDEX))


def _forget_later(log: Path, step: int) -> None:
    """Drop the rows of steps that will be made again."""
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
    """The trained weights as the trainer saves them; every process takes part."""
    if not recipe.merge_adapter:
        trainer.save_model(str(folder))
    elif trainer.is_world_process_zero():
        trainer.model.merge_and_unload().save_pretrained(folder)


def _publish(recipe: TuneRecipe, vlm: Checkpoint, work: Path, tuned: Tuned, processor: Any) -> None:
    """Put the finished folder together and rename it into place. processor: only if tokens were added."""
    saved, out = work / "saved", tuned.folder
    side = work / "side"
    side.mkdir(exist_ok=True)
    save_tune_recipe(recipe, side / "recipe.yaml")
    write_rows(side / "training.jsonl", tuned.log)
    write_text(side / "README.md", _card(recipe, tuned))
    write_json(side / "receipt.json", _receipt(recipe, tuned))
    if (work / LOG).is_file():
        shutil.copyfile(work / LOG, side / LOG)
    if (work / "trainer" / "runs").is_dir():
        shutil.copytree(work / "trainer" / "runs", side / "runs", dirs_exist_ok=True)
    if recipe.lora is not None and not recipe.merge_adapter:
        shutil.copytree(
            saved, side, dirs_exist_ok=True, ignore=shutil.ignore_patterns("training_args.bin", "README.md")
        )
        side.rename(out)
    else:
        made = open_checkpoint(saved)
        with Writer(out, _specs(vlm, made), SHARD) as writer:
            _write(writer, vlm, made)
            for file in side_files(vlm.path):
                shutil.copyfile(file, writer.folder / file.name)
            if processor is not None:
                processor.save_pretrained(writer.folder)
                shutil.copyfile(saved / "config.json", writer.folder / "config.json")
            shutil.copytree(side, writer.folder, dirs_exist_ok=True)
    shutil.rmtree(work)


def _specs(vlm: Checkpoint, made: Checkpoint) -> list[TensorSpec]:
    """The VLM's tensors in its order and dtypes; the shapes are the trained ones (a vocabulary may have grown)."""
    extra = [name for name in made.tensors if name not in vlm.tensors]
    if extra:
        raise OutputError(f"{made.path}: the trained model has {extra[0]}, the VLM has not; its weights are left there")
    known = {**vlm.tensors, **made.tensors}
    return [TensorSpec(name, info.dtype, known[name].shape) for name, info in vlm.tensors.items()]


def _write(writer: Writer, vlm: Checkpoint, made: Checkpoint) -> None:
    """Every tensor of the VLM: as trained, or as it was where the trainer saves none (a head tied to the embeddings is
    the trained embeddings)."""
    with Reader(vlm) as before, Reader(made) as after:
        for name, info in vlm.tensors.items():
            embeddings = next((other for other in made.tensors if other.endswith("embed_tokens.weight")), None)
            if name in made.tensors:
                tensor = after.tensor(name)
            elif name.endswith("lm_head.weight") and embeddings is not None:
                tensor = after.tensor(embeddings)
            else:
                tensor = before.tensor(name)
            cast = tensor.to(TORCH_DTYPES[info.dtype])
            if not torch.isfinite(cast).all():
                raise NumericalError(
                    f"{name}: NaN or infinity in {info.dtype} after training; nothing was published: lower the "
                    "learning rate and start again"
                )
            writer.write(name, cast)


def _receipt(recipe: TuneRecipe, tuned: Tuned) -> dict[str, Any]:
    import transformers
    import trl

    versions = {"vlmgraft": __version__, "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "trl": trl.__version__}
    facts = {"steps": tuned.steps, "train_loss": tuned.loss, "versions": versions}
    return {"recipe": dump_tune_recipe(recipe), **facts, "prior": [asdict(verdict) for verdict in tuned.verdicts]}


def _card(recipe: TuneRecipe, tuned: Tuned) -> str:
    """A short model card: what was tuned, towards what, on what."""
    prior = recipe.prior
    how = "supervised fine-tuning"
    if prior.mode != "none":
        how += f" with DRIFT's gradient prior ({prior.mode}, strength {prior.strength:g}) towards `{recipe.donor}`"
    pushed = sum(verdict.verdict == "pushed" for verdict in tuned.verdicts)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [vlmgraft, sft]\n---\n\n"
        f"# {tuned.folder.name}\n\n`{recipe.vlm}` after {how}: {tuned.steps} steps on `{recipe.data.train}`, mean loss "
        f"{tuned.loss:.4f}, {pushed} tensors pushed. `recipe.yaml` replays it with `vlmgraft tune`; `receipt.json` "
        "says what happened to each tensor.\n"
    )
