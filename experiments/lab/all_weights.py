"""The baseline of every comparison of gates: all projection weights, trained with the same losses.

    loss = KL(P_vlm ‖ P_W) + α · KL(P_donor ‖ P_W)         every matrix that has factors is trained, nothing else

The losses, their targets and the control of α are those of donor matching (`distill.py`); only what is trained differs:
hundreds of thousands of weights in place of one gate per singular direction. It says whether the gates' restriction to
the task vector's directions helps or only saves parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmgraft.distillation.budget import BudgetControl, FixedWeight
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.targets import TargetBatch, Targets
from vlmgraft.distillation.trainer import Training
from vlmgraft.errors import NumericalError, RecipeError
from vlmgraft.hf.modules import match_linears

OBSERVE_EVERY = 4


@dataclass(frozen=True)
class TrainedWeights:
    """The trained matrices by VLM tensor name, float32 on the CPU, and how they came about.

    settings: α at the end, the budget, and `held_out_kl`, the KL on the distiller's held-out prompts where a budget
    was controlled on them. log: per logged step both KL terms before the step and α.
    """

    weights: Mapping[str, Float[Tensor, "out in"]]
    settings: Mapping[str, Any]
    log: tuple[Mapping[str, float], ...]


def learn_weights(
    distiller: Distiller,
    donor: Targets,
    start: Mapping[str, Float[Tensor, "out in"]] | None = None,
    *,
    inject_weight: float | None = None,
    kl_budget: float | None = None,
    steps: int = 200,
    learning_rate: float = 1e-3,
    seed: int = 0,
    log_every: int = 10,
) -> TrainedWeights:
    """Train every matrix of the distiller's factors by Adam; the model is left as it was.

    donor: the donor's targets on text questions. start: the first weights, by default the VLM's; with task arithmetic
    at λ/2 it is where gates of scale λ start. inject_weight is α, or kl_budget the KL in nats per answer token that
    α is controlled to, on the distiller's held-out prompts. The learning rate decays as that of gates does.

    Raises RecipeError when the settings exclude each other or there are no held-out prompts for a budget,
    AlignmentError when a tensor of `start` has no layer, NumericalError when the loss stops being finite.
    """
    training = Training(
        inject="donor",
        inject_weight=inject_weight,
        kl_budget=kl_budget,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
    )
    monitor = distiller.held_out_targets if kl_budget is not None else None
    if kl_budget is not None and monitor is None:
        raise RecipeError("kl_budget is measured on prompts that are not trained on: give held-out questions")
    first = 1.0 if inject_weight is None else inject_weight
    control = FixedWeight(first) if kl_budget is None else BudgetControl(kl_budget, first)
    linears = match_linears(distiller.model, distiller.factors)
    log: list[dict[str, float]] = []
    keep, match = distiller.targets.order(seed), donor.order(seed + 1)
    with _trainable(distiller.model, linears, start or {}):
        optimizer = torch.optim.Adam([linear.weight for linear in linears.values()], lr=learning_rate)
        for step in range(steps):
            if isinstance(control, BudgetControl) and monitor is not None and step % OBSERVE_EVERY == 0:
                control.observe(monitor.mean_kl(distiller.model))
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate_at(step)
            row = _step(distiller.model, optimizer, next(keep), next(match), control.weight)
            control.step()
            if step % log_every == 0 or step == steps - 1:
                log.append({"step": step, **row})
        settings: dict[str, Any] = {"inject_weight": control.weight, "kl_budget": kl_budget, "steps": steps}
        if monitor is not None:
            settings["held_out_kl"] = monitor.mean_kl(distiller.model)
        weights = {name: linear.weight.detach().float().cpu().clone() for name, linear in linears.items()}
    return TrainedWeights(weights, settings, tuple(log))


def _step(
    model: Any, optimizer: torch.optim.Optimizer, keep: TargetBatch, match: TargetBatch, weight: float
) -> dict[str, float]:
    """One gradient step on one batch of each kind; gives both terms before it."""
    optimizer.zero_grad(set_to_none=True)
    divergence = keep.kl(model).mean()
    divergence.backward()
    injection = match.kl(model).mean()
    (weight * injection).backward()
    row = {"kl": float(divergence.detach()), "inject": float(injection.detach()), "inject_weight": weight}
    if not math.isfinite(row["kl"] + weight * row["inject"]):
        raise NumericalError(f"the loss is not finite ({row}): lower learning_rate")
    optimizer.step()
    return row


@contextmanager
def _trainable(model: nn.Module, linears: Mapping[str, nn.Linear], start: Mapping[str, Tensor]) -> Iterator[None]:
    """Copies of the linears' weights in their place, trainable and alone so; weights, flags and gradients are put back
    on exit, also after an exception."""
    first = match_linears(model, start)
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    before = {linear: linear.weight.data for linear in {*linears.values(), *first.values()}}
    try:
        for parameter, _, _ in flags:
            parameter.requires_grad_(False)
        for name, linear in first.items():
            linear.weight.data = start[name].to(linear.weight, copy=True)
        for name, linear in linears.items():
            if name not in first:
                linear.weight.data = linear.weight.data.clone()
            linear.weight.requires_grad_(True)
        yield
    finally:
        for linear, weight in before.items():
            linear.weight.data = weight
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
