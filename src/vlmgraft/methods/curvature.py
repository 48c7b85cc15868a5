"""Curvature gates: FRISM's update with hard gates from one pass over the calibration set, no training (METHODS.md, 2).

Only the recipe is here; training/curvature.py estimates the curvature, and the fold is FRISM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import DEFAULT_MODULES
from vlmgraft.methods.frism import Calibration, GatedFold

if TYPE_CHECKING:
    from vlmgraft.spectral.factors import Factors
    from vlmgraft.spectral.gates import Gates


@dataclass(frozen=True)
class Curvature:
    """The recipe: directions open until the drift, measured on held-out prompts, reaches the budget."""

    name: ClassVar[str] = "curvature"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base"})
    default_modules: ClassVar[tuple[str, ...]] = DEFAULT_MODULES
    granularity: ClassVar[Literal["element", "tensor"]] = "tensor"

    scale: float = 1.0
    """λ, a factor on the open part of the task vector."""
    kl_budget: float = 0.01
    """Allowed drift from the VLM, nats per token."""
    rank: Literal["full"] | int | dict[Literal["energy"], float] = "full"
    """Directions per matrix: full, a number, or {energy: share}."""
    draws: int = 1
    """Passes over the calibration questions, each with its own tokens drawn from the VLM."""
    seed: int = 0
    """Of the random numbers; one seed gives one result."""
    calibration: Calibration = field(default_factory=lambda: Calibration("calibration.jsonl"))
    """The image questions on which drift is estimated and measured."""

    def bind(self, factors: Mapping[str, Factors], gates: Gates) -> GatedFold:
        """The method that a merge runs, once the gates are known."""
        return GatedFold(factors, gates)

    def __post_init__(self) -> None:
        if self.kl_budget <= 0:
            raise RecipeError(f"method.kl_budget: {self.kl_budget} must be above 0; a zero budget is the VLM itself")
        if self.calibration.held_out == 0:
            raise RecipeError("method.kl_budget is measured on held-out prompts; set method.calibration.held_out")
        if self.draws < 1:
            raise RecipeError(f"method.draws: {self.draws} must be at least 1")
