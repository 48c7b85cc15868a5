"""The front of drift against injected energy, in one run: gates for a row of budgets, each warm-started.

A neighbour's gates are not at the next budget, and gates near 0 or 1 have next to no gradient (METHODS.md, 2): trained
on as they are, they never get there. So the warm start is the neighbour's logits, kept within reach of training
and all moved by one constant such that the drift is at the new budget before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vlmgraft.errors import RecipeError
from vlmgraft.spectral.gates import Gates
from vlmgraft.training.budget import largest_within
from vlmgraft.training.distill import Distiller
from vlmgraft.training.targets import Targets

REACH = 3.0
"""Logits of a warm start are kept within ±3: σ' is 0.045 there, so that every gate can still move."""
SHIFT_LIMIT = 12.0


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
    done: Mapping[float, Gates] | None = None,
    **settings: Any,
) -> tuple[FrontPoint, ...]:
    """Gates at every budget, by one distiller, from the largest budget to the smallest; given in ascending order.

    donor: targets for donor matching, else the energy term. first_steps: of the largest budget; steps: of the others,
    which start from their neighbour's gates. report: called with every new point. done: gates that an earlier run
    reported, by budget: not made again. settings: other fields of `Training`, such as learning_rate and seed.
    Raises RecipeError when there is no budget, or one is not above 0.
    """
    check_budgets(budgets)
    points: list[FrontPoint] = []
    inject = "energy" if donor is None else "donor"
    for budget in sorted(set(budgets), reverse=True):
        if done is not None and budget in done:
            points.append(_point(budget, done[budget]))
            continue
        start: Gates | float = moved_to(distiller, within_reach(points[-1].gates), budget) if points else 0.0
        gates = distiller.learn(
            scale,
            donor=donor,
            inject=inject,
            kl_budget=budget,
            start=start,
            steps=steps if points else first_steps,
            **settings,
        )
        points.append(_point(budget, gates))
        if report is not None:
            report(points[-1])
    return tuple(reversed(points))


def check_budgets(budgets: Sequence[float]) -> None:
    """Raise RecipeError when there is no budget, or one is not above 0."""
    if not budgets or not min(budgets) > 0:
        raise RecipeError(f"budgets: {list(budgets)} must be numbers above 0, at least one")


def _point(budget: float, gates: Gates) -> FrontPoint:
    return FrontPoint(budget, gates.settings["held_out_kl"], gates.settings["energy"], gates)


def within_reach(gates: Gates, limit: float = REACH) -> Gates:
    """The same gates with logits kept within ±limit, as a start that training can move."""
    return replace(gates, logits={name: value.clamp(-limit, limit) for name, value in gates.logits.items()})


def moved_to(distiller: Distiller, gates: Gates, budget: float) -> Gates:
    """All logits moved by the same constant within ±12, such that the held-out drift is the largest within the budget.

    The settings' `held_out_kl` and `energy` are those of the moved gates.
    """

    s = {name: distiller.factors[name].s.float().cpu() for name in gates.logits}

    def moved(by: float) -> Gates:
        return replace(gates, logits={name: value + by for name, value in gates.logits.items()})

    def spectra(by: float) -> dict[str, Tensor]:
        now = moved(by)
        return {name: now.spectrum(name, s[name]) for name in s}

    with distiller.measuring() as measure:
        by, reached = largest_within(lambda by: measure(spectra(by)), budget, -SHIFT_LIMIT, SHIFT_LIMIT)
    result = moved(by)
    injected = sum(float((result.open(name) * s[name]).square().sum()) for name in s)
    whole = sum(float(values.square().sum()) for values in s.values())
    settings = {**gates.settings, "held_out_kl": reached, "energy": injected / max(whole, 1e-30)}
    return replace(result, settings=settings)
