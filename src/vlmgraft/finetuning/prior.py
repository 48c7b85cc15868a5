"""DRIFT's gradient prior as pure functions: how far gradients move along the donor's direction (arXiv 2510.15050).

    absolute   g' = g − a·Δ
    grad_norm  g' = g − a·‖g‖·Δ/‖Δ‖
    adaptive   g' = g − a·(1 + cos(g, Δ))/2 · ‖g‖·Δ/‖Δ‖

The paper writes `+` with a = −1, its code `−` with a = +1, which is the same. A positive strength moves the weights
towards the donor, since the optimiser steps against g'. The adaptive push is strongest (a·‖g‖) where the data would
move the weight away from the donor, and vanishes where they already move it along Δ. In absolute mode the released code
rescales Δ to the parameter's norm, and the paper does not: see `rescale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from vlmgraft.errors import RecipeError

Mode = Literal["adaptive", "grad_norm", "absolute"]
Schedule = Literal["constant", "linear", "cosine"]
Storage = Literal["device", "cpu"]


@dataclass(frozen=True)
class PushRule:
    """How strongly gradients are pushed. strength: a, at the start; schedule: how it decays to zero over training.

    rescale: in absolute mode, rescale Δ to the parameter's norm, as the released code does.
    """

    mode: Mode = "adaptive"
    strength: float = 1.0
    schedule: Schedule = "constant"
    rescale: bool = False

    def __post_init__(self) -> None:
        for option, kind in (("mode", Mode), ("schedule", Schedule)):
            value = getattr(self, option)
            if value not in get_args(kind):
                raise RecipeError(f"prior.{option}: {value!r} is none of {', '.join(get_args(kind))}")
        if not 0 <= self.strength < math.inf:
            raise RecipeError(f"prior.strength: {self.strength} must be 0 or more; a positive one moves to the donor")
        if self.rescale and self.mode != "absolute":
            raise RecipeError(f"prior.rescale: only absolute takes Δ at a length of its own, not {self.mode}")

    def strength_at(self, progress: float) -> float:
        """The strength when a share `progress` (0 to 1) of the training is done."""
        left = 1 - min(max(progress, 0.0), 1.0)
        factors = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
        return self.strength * factors[self.schedule]


@dataclass(frozen=True)
class PushVerdict:
    """What the prior does with one tensor of the VLM: pushed, zero (Δ vanishes), excluded or kept, and why."""

    name: str
    verdict: Literal["pushed", "zero", "excluded", "kept"]
    reason: str


@dataclass(frozen=True)
class Delta:
    """Δ of one tensor. name: on disk, in the VLM. role: inside the text model.

    value: Δ, on the CPU; a meta tensor in a prior that computes its values when it is bound. norm: ‖Δ‖ as stored.
    start: ⟨W_vlm, Δ⟩, from which the distance covered towards the donor is measured. size: ‖W_vlm‖. share: the factor
    of the rule's strength for this tensor.
    """

    name: str
    role: str
    group: str
    value: Tensor
    norm: float
    start: float
    size: float
    share: float = 1.0


@dataclass(frozen=True)
class Prior:
    """A rule, the Δ it pushes along (by VLM tensor name), and a verdict for every tensor of the VLM.

    store: where Δ is kept while training: `device` takes 2 bytes per element of the accelerator's memory, `cpu` keeps Δ
    in pinned memory and copies it at every step. sources: checkpoint → tensor → digest of what Δ was made from. opened:
    for a prior that keeps no values, such as one made under torchrun: opens the sources and gives a function from a
    tensor's name to its Δ, computed again.
    """

    rule: PushRule
    deltas: Mapping[str, Delta]
    verdicts: tuple[PushVerdict, ...]
    store: Storage = "device"
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    opened: Callable[[], AbstractContextManager[Callable[[str], Tensor]]] | None = None

    def values(self) -> AbstractContextManager[Callable[[str], Tensor]]:
        """Inside the context, a function from a tensor's name to its whole Δ: kept, or computed again one at a time."""
        return self.opened() if self.opened else nullcontext(lambda name: self.deltas[name].value)


def cosine(dot: Tensor, grad_norm: Tensor, delta_norm: Tensor) -> Tensor:
    """cos(g, Δ) from ⟨g, Δ⟩ and both norms (any shape); 0 where one of them is zero, and never beyond ±1."""
    scale = grad_norm * delta_norm
    return torch.where(scale > 0, dot / scale, torch.zeros_like(dot)).clamp(-1, 1)


def push_length(
    mode: Mode, strength: float | Tensor, grad_norm: Tensor, dot: Tensor, delta_norm: Tensor, target_norm: Tensor
) -> Tensor:
    """ℓ ≥ 0 of g' = g − ℓ·Δ/‖Δ‖, for many tensors at once (all arguments of one shape).

    target_norm: the norm of Δ in absolute mode: ‖Δ‖ itself, or the parameter's norm.
    """
    if mode == "absolute":
        return strength * target_norm
    if mode == "grad_norm":
        return strength * grad_norm
    return strength * (1 + cosine(dot, grad_norm, delta_norm)) / 2 * grad_norm
