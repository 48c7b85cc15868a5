"""The front of drift against injected energy, in one run: gates for a row of budgets, each warm-started.

From the largest budget to the smallest: tightening closes open gates, whose gradients are alive, while a gate that is
closed has next to none and would not open again (METHODS.md, 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmgraft.errors import RecipeError
from vlmgraft.spectral.gates import Gates
from vlmgraft.training.distill import Distiller
from vlmgraft.training.targets import Targets

REACH = 3.0
"""Logits of a warm start are kept within ±3: σ' is 0.045 there, so that every gate can still move."""


@dataclass(frozen=True)
class FrontPoint:
    """One budget ε in nats per token: the drift reached on the prompts it is controlled on, the share of the task
    vector's energy that is injected, and the gates."""

    budget: float
    held_out_kl: float
    energy: float
    gates: Gates


def pareto_front(
    distiller: Distiller,
    budgets: Sequence[float],
    scale: float = 1.0,
    *,
    donor: Targets | None = None,
    first_steps: int = 100,
    steps: int = 50,
    report: Callable[[FrontPoint], None] | None = None,
    **settings: Any,
) -> tuple[FrontPoint, ...]:
    """Gates at every budget, by one distiller, in ascending order of the budget.

    donor: targets for donor matching, else the energy term. first_steps: of the largest budget; steps: of the others,
    which start from their neighbour's gates. settings: other fields of `Training`, such as learning_rate and seed.
    Raises RecipeError when there is no budget, or one is not above 0.
    """
    if not budgets or min(budgets) <= 0:
        raise RecipeError(f"budgets: {list(budgets)} must be numbers above 0, at least one")
    points: list[FrontPoint] = []
    inject = "energy" if donor is None else "donor"
    for budget in sorted(set(budgets), reverse=True):
        start: Gates | float = within_reach(points[-1].gates) if points else 0.0
        gates = distiller.learn(
            scale,
            donor=donor,
            inject=inject,
            kl_budget=budget,
            start=start,
            steps=steps if points else first_steps,
            **settings,
        )
        points.append(FrontPoint(budget, gates.settings["held_out_kl"], gates.settings["energy"], gates))
        if report is not None:
            report(points[-1])
    return tuple(reversed(points))


def within_reach(gates: Gates, limit: float = REACH) -> Gates:
    """The same gates with logits kept within ±limit, as a start that training can move."""
    return replace(gates, logits={name: value.clamp(-limit, limit) for name, value in gates.logits.items()})
