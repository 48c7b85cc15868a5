"""Core gates: a learned k×k matrix per projection in place of one gate per direction (ours; frames as in LoRA-XS).

    W = W_vlm + U_k M V_kᵀ          U_k, V_k: the first k singular directions of τ, frozen (arXiv 2405.17604)

M starts at c·diag(s_k). Gates can only scale directions of τ; M can also turn them into each other, so that it may tell
skill and damage apart inside the leading subspace. The losses are those of gates: KL from the VLM, plus α times the KL
from the donor on its own answers, or α‖M − diag(s)‖²/‖s‖², the distance from the whole task vector (the energy term
has no bound without a gate). A KL budget sets α as in `distillation/budget.py`; at the end M is scaled to be just
within it.

M = P diag(c) Qᵀ makes U_k P, c and V_k Q a decomposition of what was learned: `learn_core` gives factors with gates
that are all open, which fold, export as LoRA adapters and are scaled back to a bound like any other gates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmgraft.distillation.budget import BudgetControl, FixedWeight, largest_within
from vlmgraft.distillation.gated_layers import frozen
from vlmgraft.errors import AlignmentError, NumericalError, RecipeError
from vlmgraft.methods.frism import check_budget
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gates import Gates, constant_gates

if TYPE_CHECKING:
    from vlmgraft.distillation.distill import Distiller
    from vlmgraft.distillation.targets import Targets

OBSERVE_EVERY = 4
SMALLEST, LARGEST = -12.0, 1.0
"""Logarithms of the factors on all M between which the budget is met at the end."""


@dataclass(frozen=True)
class CoreTraining:
    """start: c. weight: α; not beside kl_budget, nats per token on the distiller's held-out prompts, which sets it."""

    rank: int = 16
    start: float = 0.5
    weight: float | None = None
    kl_budget: float | None = None
    steps: int = 100
    learning_rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.steps < 0 or not self.learning_rate > 0:
            raise RecipeError(f"core gates: rank {self.rank}, steps {self.steps} and learning_rate must be positive")
        if self.weight is not None and self.kl_budget is not None:
            raise RecipeError("core gates: weight and kl_budget exclude each other; the budget sets the weight")
        if self.kl_budget is not None:
            check_budget(self.kl_budget, "core gates: kl_budget")


def learn_core(
    distiller: Distiller, training: CoreTraining, donor: Targets | None = None
) -> tuple[dict[str, Factors], Gates]:
    """Learn M for every projection; what was learned, as factors and open gates. The model is left as it was.

    donor: targets of donor matching; without them M is drawn to the task vector.

    Raises:
        RecipeError: a budget without held-out prompts. AlignmentError: fused experts, which have no M here.
        NumericalError: the loss is not finite; lower the learning rate.
    """
    if training.kl_budget is not None and distiller.held_out_targets is None:
        raise RecipeError("core gates: kl_budget is measured on held-out prompts; give the distiller some")
    frames = {name: first(factors, training.rank) for name, factors in distiller.factors.items()}
    device = distiller.model.device
    s = {name: frame.s.to(device) for name, frame in frames.items()}
    cores = {name: (training.start * values.diag()).requires_grad_() for name, values in s.items()}
    whole = sum(float(values.square().sum()) for values in s.values())
    control: FixedWeight | BudgetControl = FixedWeight(1.0 if training.weight is None else training.weight)
    if training.kl_budget is not None:
        control = BudgetControl(training.kl_budget, 1.0)
    optimizer = torch.optim.Adam(
        cores.values(), lr=training.learning_rate * math.sqrt(whole / sum(map(len, s.values())))
    )
    keep = distiller.targets.order(training.seed)
    match = donor.order(training.seed + 1) if donor is not None else None
    log = []
    with cores_applied(distiller, frames, cores):
        for step, batch in enumerate(islice(keep, training.steps)):
            if isinstance(control, BudgetControl) and step % OBSERVE_EVERY == 0:
                control.observe(distiller.keep_kl(None))
            optimizer.zero_grad(set_to_none=True)
            kl = batch.kl(distiller.model).mean()
            if match is not None:
                inject = next(match).kl(distiller.model).mean()
            else:
                inject = torch.stack([(cores[name] - s[name].diag()).square().sum() for name in s]).sum() / whole
            loss = kl + control.weight * inject
            if not math.isfinite(float(loss.detach())):
                raise NumericalError(f"the loss is {float(loss)}: lower learning_rate ({training.learning_rate})")
            loss.backward()
            optimizer.step()
            control.step()
            log.append({"step": step, "kl": round(float(kl.detach()), 7), "inject": round(float(inject.detach()), 7)})
        reached = _land(distiller, cores, training.kl_budget) if training.kl_budget is not None else None
    learned = {name: turned(frames[name], core.detach().cpu()) for name, core in cores.items()}
    settings = {"inject": "donor" if match is not None else "distance", "granularity": "core", "held_out_kl": reached}
    settings |= {"rank": training.rank, "steps": training.steps, "inject_weight": control.weight, "seed": training.seed}
    gates = constant_gates({name: len(factors.s) for name, factors in learned.items()}, math.inf, 1.0)
    return learned, replace(gates, settings=settings, log=tuple(log))


def first(factors: Factors, rank: int) -> Factors:
    """The first directions of one matrix, float32 on the CPU; raises AlignmentError for a stack of experts."""
    if factors.s.ndim > 1:
        raise AlignmentError(f"{factors.name}: core gates are for matrices, not for fused experts; leave them out")
    U, s, Vh = (part.float().cpu() for part in (factors.U[:, :rank], factors.s[:rank], factors.Vh[:rank]))
    return replace(factors, U=U, s=s, Vh=Vh)


def turned(frame: Factors, core: Float[Tensor, "k k"]) -> Factors:
    """U_k M V_kᵀ decomposed: M = P diag(c) Qᵀ in float64."""
    P, c, Qh = torch.linalg.svd(core.double())
    U, Vh = (frame.U.double() @ P).float(), (Qh @ frame.Vh.double()).float()
    return replace(frame, U=U, s=c.float(), Vh=Vh)


@contextmanager
def cores_applied(distiller: Distiller, frames: Mapping[str, Factors], cores: Mapping[str, Tensor]) -> Iterator[None]:
    """The distiller's model with U_k M V_kᵀ x added to every projection's output; as before on exit."""

    def add(U: Tensor, core: Tensor, Vh: Tensor, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + ((inputs[0] @ Vh.mT) @ core.to(output.dtype).mT) @ U.mT

    with frozen(distiller.model), ExitStack() as hooks:
        for name, linear in distiller.linears.items():
            if not isinstance(linear, nn.Linear):
                raise AlignmentError(f"{name}: core gates need a linear layer, not {type(linear).__name__}")
            U, Vh = (part.to(linear.weight) for part in (frames[name].U, frames[name].Vh))
            hooks.callback(linear.register_forward_hook(partial(add, U, cores[name], Vh)).remove)
        yield


@torch.no_grad()
def _land(distiller: Distiller, cores: Mapping[str, Tensor], budget: float) -> float:
    """Scale all M by one factor such that the KL on the held-out prompts is just within the budget; that KL."""
    learned = {name: core.detach().clone() for name, core in cores.items()}

    def scale_by(shift: float) -> None:
        for name, core in cores.items():
            core.copy_(math.exp(shift) * learned[name])

    def kl_at(shift: float) -> float:
        scale_by(shift)
        return distiller.keep_kl(None)

    shift, kl = largest_within(kl_at, budget, SMALLEST, LARGEST)
    scale_by(shift)
    return kl
