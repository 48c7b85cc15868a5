"""DRIFT as a callback of any transformers or TRL trainer: `callbacks=[DriftCallback(prior)]`.

The trainer has no event between the last backward pass of a step and the clipping of its gradients
(`on_pre_optimizer_step` comes after it). So the callback waits for the end of that backward pass inside autograd,
behind the gradient reductions of DDP and FSDP2, and pushes the accumulated gradient there: once per optimiser step,
before clipping, whether the trainer clips or not.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from vlmgraft.errors import RecipeError, VlmgraftError
from vlmgraft.finetuning.prior import Prior
from vlmgraft.finetuning.push import Bound, bind_prior, hook_backward
from vlmgraft.storage.jsonl import append_row

LOG = "drift.jsonl"
BEHIND = 3
"""How often the push is requeued at the end of autograd's queue, where DDP and FSDP2 put their last work too."""


class DriftCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Pushes gradients along a prior while a trainer trains.

    when: "step" (once per optimiser step, on the accumulated gradient) or "backward" (as the code released with the
    paper: on the gradient of each backward pass). log: a JSON-lines file with one row per tensor whenever the trainer
    logs (default: drift.jsonl in the trainer's output folder): cos(g, Δ), push strength ‖g' − g‖/‖g‖, and the share
    of the distance to the donor that is covered. Their means by module group go into the trainer's log as
    drift_cos_attention and so on.

    Raises, when training begins: RecipeError for DeepSpeed, FSDP 1 and reentrant checkpointing, which hide gradients or
    the end of a backward pass; AlignmentError when the model trains nothing that the prior pushes.
    """

    def __init__(self, prior: Prior, *, when: Literal["step", "backward"] = "step", log: Path | None = None) -> None:
        if when not in ("step", "backward"):
            raise RecipeError(f"prior.when: {when!r} is neither step nor backward")
        self.prior, self.when, self._log = prior, when, log
        self.log_file: Path | None = None
        self.bound: Bound | None = None
        self._handles: list[Any] = []
        self._progress, self._queued, self._pushed = 0.0, False, False
        self._optimizer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bind the prior to the model that is trained, and hook its gradients."""
        self.remove()
        self._optimizer = kwargs["optimizer"]
        _refuse(args, str(self._optimizer.accelerator_state.distributed_type))
        self.bound = bind_prior(self.prior, kwargs["model"], whole=self.when == "backward")
        self._write = state.is_world_process_zero
        self.log_file = self._log or Path(args.output_dir) / LOG
        if self.when == "backward":
            self._handles = hook_backward(self.bound, lambda: (self._progress, self._loss_scale()))
            return
        parameters = [parameter for target in self.bound.targets for parameter in target.parameters()]
        self._handles = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in parameters]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the share of the training that is done, for the schedule, when an optimiser step begins."""
        self._progress = state.global_step / state.max_steps if state.max_steps > 0 else 0.0
        self._queued = self._pushed = False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the gradients of this optimiser step were pushed."""
        if self.when == "step" and not self._pushed:
            raise VlmgraftError(
                "DriftCallback: an optimiser step was made without a push: no gradient reached the prior's modules in "
                "its last backward pass; call bind_prior(...).push() in this trainer's training step instead"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write rows per tensor to the log file, and means per group to the trainer's log."""
        if self.bound is None or not self.bound.last or logs is None or "loss" not in logs:
            return
        moved = self.bound.moved()
        means: dict[str, list[float]] = defaultdict(list)
        for target in self.bound.targets:
            name, group = target.delta.name, target.delta.group
            if name not in self.bound.last:
                continue
            row = dict(zip(("cos", "push", "moved"), (*self.bound.last[name], moved[name]), strict=True))
            for key, value in row.items():
                means[f"drift_{key}_{group}"].append(value)
            if self._write and self.log_file is not None:
                append_row(self.log_file, {"step": state.global_step, "tensor": name, **row})
        averages = {key: round(fmean(values), 6) for key, values in means.items()}
        logs.update(averages)
        if state.log_history:  # the trainer appended a copy of `logs` before this call
            state.log_history[-1].update(averages)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks: the model is as before the training."""
        self.remove()

    def remove(self) -> None:
        """Remove all hooks from the model; to be called by hand only after a training that raised."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _arrived(self, parameter: torch.nn.Parameter) -> None:
        """A gradient was accumulated: in the last pass of a step, queue the push for the end of that pass."""
        if self._queued or not self._optimizer.gradient_state.sync_gradients:
            return
        self._queued = True
        _at_the_end(self._push, BEHIND)

    def _push(self) -> None:
        if self._pushed or self.bound is None:
            raise VlmgraftError("DriftCallback: two backward passes ended one optimiser step; push by hand instead")
        self._pushed = True
        scaled = self._scaler() is not None
        self.bound.push(self._progress, loss_scale=self._loss_scale(), overflow=scaled)

    def _scaler(self) -> Any:
        scaler = self._optimizer.scaler
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _loss_scale(self) -> float:
        scaler = self._scaler()
        return 1.0 if scaler is None else float(scaler.get_scale())


def _at_the_end(run: Callable[[], None], behind: int) -> None:
    """Run at the end of the current backward pass, behind everything that is queued by then."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback((lambda: _at_the_end(run, behind - 1)) if behind else run)


def refuse_deepspeed(configured: object) -> None:
    """Raise RecipeError where the trainer's arguments configure DeepSpeed, or `accelerate launch` has chosen it."""
    if configured or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").strip().lower() in ("1", "true", "yes", "on"):
        raise RecipeError(
            "deepspeed: ZeRO-2 and ZeRO-3 keep gradients to themselves, in parts, so that they cannot be pushed; use "
            "DDP or FSDP2"
        )


def _refuse(args: Any, distributed: str) -> None:
    """Refuse trainings in which the push would be wrong. distributed: accelerate's distributed type, which accelerate's
    own config may set to DeepSpeed although the trainer's arguments do not name it."""
    refuse_deepspeed(args.deepspeed or distributed.endswith("DEEPSPEED"))
    checkpointing = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # current name, older name
    if any((getattr(args, name, None) or {}).get("use_reentrant") for name in checkpointing):
        raise RecipeError(
            "activation_checkpointing_kwargs: reentrant checkpointing splits the backward pass, so that its end is not "
            "known; leave use_reentrant out, it is off by default"
        )
    if args.fsdp:
        from accelerate.state import AcceleratorState

        if AcceleratorState().fsdp_plugin.fsdp_version == 1:
            raise RecipeError("fsdp: version 1 flattens parameters, so that they have no matrices; set fsdp_version 2")
