"""Curvature gates: FRISM's update with hard gates from one pass over the calibration set, no training.

Only the recipe is here; distillation/curvature.py estimates the curvature, and the fold is FRISM's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from vlmgraft.errors import RecipeError
from vlmgraft.methods.calibration import Calibration
from vlmgraft.methods.frism import DEFAULT_RANK, GatedMethod


@dataclass(frozen=True)
class Curvature(GatedMethod):
    """The recipe: directions open until the KL, measured on held-out prompts, reaches the budget."""

    name: ClassVar[str] = "curvature"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base"})

    scale: float = 1.0
    """λ, a factor on the open part of the task vector."""
    kl_budget: float = 0.01
    """Allowed KL from the VLM, nats per token."""
    rank: Literal["full"] | int | dict[Literal["energy"], float] = DEFAULT_RANK
    """Directions per matrix: a number, full, or {energy: share}."""
    draws: int = 1
    """Passes over the calibration questions, each with its own tokens drawn from the VLM."""
    seed: int = 0
    """Seed of the random numbers; equal seeds give equal results."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Less memory, more time, the same gates; auto: if the backward pass would not fit otherwise."""
    offload: Literal["auto"] | bool = "auto"
    """Keep layers in host memory: more time, the same gates; auto: if they would not fit on the GPU otherwise."""
    calibration: Calibration = field(default_factory=lambda: Calibration("calibration.jsonl"))
    """The image questions on which the KL is estimated and measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 1:
            raise RecipeError(f"method.draws: {self.draws} must be at least 1")
