"""The front of KL divergence against injected energy, in one run: gates for a row of budgets, each warm-started.

Gates near 0 or 1 have next to no gradient: trained on as they are, a neighbour's gates do not reach the next budget. So
the warm start is the neighbour's logits, clamped to where training can move them, and all moved by one constant such
that the KL is at the new budget before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlmgraft.distillation.budget import largest_within
from vlmgraft.errors import RecipeError
from vlmgraft.spectral.gates import Gates, injected_energy

if TYPE_CHECKING:
    from vlmgraft.distillation.distill import Distiller
    from vlmgraft.distillation.targets import Targets

REACH = 3.0
"""Logits of a warm start are kept within ±3: σ' is 0.045 there, so that every gate can still move."""
SHIFT_LIMIT = 12.0


@dataclass(frozen=True)
class FrontPoint:
    """One budget ε in nats per token: the KL reached on the prompts it is controlled on, the share of the task
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
    """All logits moved by the same constant within ±12, such that the held-out KL is the largest within the budget.

    The settings' `held_out_kl` and `energy` are those of the moved gates.
    """
    s = {name: distiller.factors[name].s.float().cpu() for name in gates.logits}

    def moved(by: float) -> Gates:
        return replace(gates, logits={name: value + by for name, value in gates.logits.items()})

    def spectra(by: float) -> dict[str, Tensor]:
        shifted = moved(by)
        return {name: shifted.spectrum(name, s[name]) for name in s}

    with distiller.measuring() as measure:
        by, reached = largest_within(lambda by: measure(spectra(by)), budget, -SHIFT_LIMIT, SHIFT_LIMIT)
    result = moved(by)
    settings = {**gates.settings, "held_out_kl": reached, "energy": injected_energy(result, s)}
    return replace(result, settings=settings)
