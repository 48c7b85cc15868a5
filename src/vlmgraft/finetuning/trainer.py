"""Multimodal supervised fine-tuning on TRL's trainer: the loss is on the answer's tokens only."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import PrinterCallback, TrainerCallback

from vlmgraft.data.traces import Traces
from vlmgraft.errors import AlignmentError, CheckpointError, DataError, RecipeError
from vlmgraft.finetuning.callback import DriftCallback
from vlmgraft.hf.modules import output_head, text_model, tokenizer_of
from vlmgraft.hf.placement import default_device
from vlmgraft.hf.templates import rendered
from vlmgraft.storage.progress import LOG, LogProgress, Progress

DEFAULTS: Mapping[str, Any] = {
    "num_train_epochs": 3,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 0.2,
    "save_total_limit": 1,
    "activation_checkpointing": False,
    "max_length": None,
    "report_to": [],
    "disable_tqdm": True,
}
"""Replacements of the trainer's own defaults: the paper's released run, no truncation, no reporting."""

FAILURES = (ValueError, TypeError, LookupError)
"""Exceptions that processors raise for an example that they cannot read."""

NAMES = {"activation_checkpointing": "gradient_checkpointing"}
NAMES |= {f"{new}_kwargs": f"{old}_kwargs" for new, old in NAMES.items()}
"""Newer and older name of a field that differs between versions. Either is accepted and mapped to the newest that the
trainer knows; otherwise our default under one name could override the recipe's value under the other."""

OURS = ("output_dir", "completion_only_loss", "assistant_only_loss", "packing", "padding_free", "dataset_text_field")
"""Fields of the trainer that the command sets itself."""


def need_trl() -> None:
    """Raise RecipeError for a missing library before anything is loaded."""
    for library in ("trl", "datasets"):
        if importlib.util.find_spec(library) is None:
            raise RecipeError(f"fine-tuning needs {library}, which is not installed: pip install 'vlmgraft[train]'")


def trainer_arguments(folder: Path, train: Mapping[str, Any]) -> Any:
    """TRL's SFTConfig from the recipe's `train`: our defaults, overridden by its fields, on the requested device.

    Raises:
        InputError: that device cannot be used.
        RecipeError: an unknown field (with the nearest one), one that the command sets itself, or an invalid value.
    """
    need_trl()
    import difflib

    from trl import SFTConfig

    names = {field.name for field in dataclasses.fields(SFTConfig)} - set(OURS)
    short = {"epochs": "num_train_epochs"}
    for pair in NAMES.items():
        short |= dict.fromkeys(pair, next(name for name in pair if name in names))
    given = {short.get(key, key): value for key, value in train.items()}
    if "warmup_ratio" in given:  # older versions' name of warmup_steps below 1
        ratio = given.pop("warmup_ratio")
        if "warmup_steps" in given:
            raise RecipeError("train.warmup_ratio: warmup_steps is given too; keep one (a ratio below 1, or steps)")
        if not isinstance(ratio, float | int) or not 0 <= ratio < 1:
            raise RecipeError(f"train.warmup_ratio: {ratio!r} must be a number from 0 to below 1")
        given["warmup_steps"] = float(ratio)
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(key, [*names, "epochs"], 1)
            why = "is set by the command" if key in OURS else "is no field of the trainer"
            raise RecipeError(f"train.{key}: {why}" + (f"; did you mean {near[0]!r}?" if near else ""))
    kinds = typing.get_type_hints(SFTConfig)
    for key, value in given.items():  # else the trainer opens a number as a file descriptor, and 0 blocks for ever
        kind: TypeAdapter[Any] = TypeAdapter(kinds[key], config=ConfigDict(arbitrary_types_allowed=True))
        try:
            given[key] = kind.validate_python(value)
        except ValidationError as error:
            raise RecipeError(f"train.{key}: {value!r:.80}: {error.errors()[0]['msg'].lower()}") from None
    defaults = {short.get(key, key): value for key, value in DEFAULTS.items()}
    device_type = default_device().type if os.environ.get("VLMGRAFT_DEVICE") else ""
    place = {"use_cpu": device_type == "cpu"} if device_type else {}
    settings = {**defaults, "bf16": torch.cuda.is_available() and device_type != "cpu", **given, **place}
    try:
        return SFTConfig(output_dir=str(folder), completion_only_loss=True, **settings)
    except (TypeError, ValueError, OverflowError, ImportError, OSError) as error:
        raise RecipeError(f"train: {str(error).splitlines()[0]}") from None


def add_tokens(model: Any, processor: Any, tokens: Sequence[str]) -> int:
    """Give tokens such as <think> an id of their own, and add embedding rows if the model has none to spare.

    The new rows start at the mean of the others (transformers' own rule). Returns the number of new tokens.
    """
    tokenizer = tokenizer_of(processor)
    new = [token for token in tokens if token not in tokenizer.get_vocab()]
    if new:
        tokenizer.add_tokens(new)
        needed = 1 + max(tokenizer.get_vocab().values())
        if needed > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(needed)
    return len(new)


def freeze_vision(model: Any) -> None:
    """Train the language model and its head only: the tower and the projector are frozen."""
    model.requires_grad_(False)
    text_model(model).requires_grad_(True)
    output_head(model).requires_grad_(True)


def lora_config(options: Mapping[str, Any], model: Any) -> Any:
    """peft's LoraConfig; without `target_modules`, the seven projections of the language model, never the tower's.

    Raises:
        RecipeError: an option that peft does not know, or peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise RecipeError("lora: needs peft, which is not installed: pip install 'vlmgraft[train]'")
    from peft import LoraConfig

    decoder = next(name for name, module in model.named_modules() if module is text_model(model))
    projections = "q|k|v|o|gate|up|down"
    defaults = {"r": 16, "lora_alpha": 32, "target_modules": rf"{decoder}\.layers\..*\.({projections})_proj"}
    try:
        return LoraConfig(task_type="CAUSAL_LM", **{**defaults, **options})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"lora: {error}") from None


def build_trainer(
    model: Any,
    processor: Any,
    train: Traces,
    arguments: Any,
    *,
    validation: Traces | None = None,
    drift: DriftCallback | None = None,
    lora: Any = None,
) -> Any:
    """TRL's SFTTrainer on traces, with the drift callback in front of the loggers, so that they report its figures.

    Raises:
        CheckpointError: the processor reads text only. DataError: the prompts and answers leave nothing to learn.
    """
    from trl import SFTTrainer

    if processor is tokenizer_of(processor):
        raise CheckpointError(
            f"{processor.name_or_path}: a tokenizer but no processor, which images need; copy preprocessor_config.json "
            "and the other files of the VLM's processor into the folder"
        )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=train.dataset(),
        eval_dataset=None if validation is None else validation.dataset(),
        processing_class=processor,
        peft_config=lora,
    )
    if drift is not None:
        trainer.callback_handler.callbacks.insert(0, drift)
    for traces in filter(None, (train, validation)):
        _check_prompts(processor, traces)
    _check_batch(trainer, train)
    trainer.data_collator = _NamingCollator(trainer.data_collator)
    return trainer


class _NamingCollator:
    """A collator that names the example when it fails in the middle of a training."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        copies = [dict(example) for example in examples]  # TRL changes the examples
        try:
            return self.collator(examples)
        except FAILURES as error:
            if len(examples) > 1:
                for example in copies:
                    self([example])
            prompt = "".join(part["text"] or "" for turn in copies[0]["prompt"] for part in turn["content"])
            raise DataError(f"a trace cannot be read by the processor ({error!s:.200}): {prompt!r:.80}") from error


def _check_prompts(processor: Any, traces: Traces) -> None:
    """Render every prompt within limits; raise DataError if a text contains a placeholder token of an image."""
    marks = [mark for key in ("image_token", "video_token") if isinstance(mark := getattr(processor, key, None), str)]
    for number, trace in enumerate(traces.traces, 1):
        rendered(processor, trace.prompt)
        text = trace.answer + "".join(part.get("text", "") for turn in trace.prompt for part in turn["content"])
        for mark in marks:
            if mark in text:
                raise DataError(
                    f"{traces.name}, row {number}: its text holds {mark}, which stands for an image here; mend the "
                    "row, or drop it"
                )


def _check_batch(trainer: Any, traces: Traces) -> None:
    """Collate the longest trace as the trainer will: its labels must be the answer, and nothing of the prompt."""
    longest = max(range(len(traces.traces)), key=lambda index: len(traces.traces[index].answer))
    try:
        batch = trainer.data_collator([trainer.train_dataset[longest]])
    except FAILURES as error:
        raise DataError(f"{traces.name}, row {longest + 1}: the processor cannot read it: {error}") from error
    learned = batch["labels"] != -100
    if not learned.any() or learned.all():
        raise DataError(
            f"{traces.name}, row {longest + 1}: {int(learned.sum())} of {learned.numel()} tokens are learned"
        )
    limit = getattr(trainer.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and batch["input_ids"].shape[1] > limit:
        length = batch["input_ids"].shape[1]
        raise DataError(f"{traces.name}, row {longest + 1}: {length} tokens, the model reads {limit}; shorten it")
    rows = trainer.model.get_input_embeddings().weight.shape[0]
    if int(batch["input_ids"].max()) >= rows:
        raise AlignmentError(f"the processor has token {int(batch['input_ids'].max())}, the model {rows} embeddings")


class TellProgress(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Reports the progress of the training, and its figures in the log of `vlmgraft`, in place of what the trainer
    prints on standard output."""

    def __init__(self, trainer: Any, progress: Progress | None) -> None:
        self.progress = progress or LogProgress()
        trainer.remove_callback(PrinterCallback)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report an optimiser step."""
        if state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, "training")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Log a row of figures."""
        if state.is_world_process_zero:
            shown = ", ".join(f"{key} {value:.4g}" for key, value in (logs or {}).items() if isinstance(value, float))
            LOG.info("step %d: %s", state.global_step, shown)


class LogWhenSaving(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Logs at every saved step and at the last one, so that a resumed training has the log of an uninterrupted one.

    transformers 5.23 drops the losses since the last row when it saves a checkpoint, and its final mean loss covers the
    steps since the training was resumed; TRL 1.16 restarts its token count. Therefore a row is logged at every
    checkpoint, the count continues from the last one, and `whole_log` takes the mean over the rows.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Continue the token count in the log of the resumed checkpoint, if any."""
        counts = [row["num_tokens"] for row in state.log_history if "num_tokens" in row]
        if counts and hasattr(self.trainer, "_total_train_tokens"):
            self.trainer._total_train_tokens = int(counts[-1])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Log at saved steps and at the last one, after the trainer's own callback has decided what is due."""
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True
        return control


def whole_log(log: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The rows, the last of them with the mean loss of all steps (NaN where none was logged)."""
    total, before = 0.0, 0
    for row in log:
        if "loss" in row:
            total, before = total + float(row["loss"]) * (row["step"] - before), int(row["step"])
    mean = total / before if before else float("nan")
    return tuple(dict(sorted(row.items())) for row in (*log[:-1], {**log[-1], "train_loss": mean}))
