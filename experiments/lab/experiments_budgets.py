"""Experiments about budgets themselves: fronts, how the KL is spread over prompts, and where trainings end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from experiments.lab.experiments import SCALE, Bench, Job, Row
from vlmgraft.distillation.front import pareto_front
from vlmgraft.lab.compare import LEARNING_RATE

FRONT = (0.001, 0.002, 0.004, 0.008, 0.016)


def front(bench: Bench, budgets: Sequence[float]) -> list[Job]:
    """Both fronts of KL against injected energy, each in one run with warm starts."""
    return [
        Job("front", {"inject": inject, "budgets": list(FRONT)}, partial(_front, bench, inject))
        for inject in ("energy", "donor")
    ]


def scatter(bench: Bench, budgets: Sequence[float]) -> list[Job]:
    """How unevenly the KL is spread over prompts, for untrained merges at every budget."""
    factors = bench.comparison.factors

    def row(budget: float) -> Row:
        return bench.scatter(bench.at_budget({name: f.update() for name, f in factors.items()}, budget)[0])

    return [Job("scatter", {"budget": budget}, partial(row, budget)) for budget in budgets]


LANDING_BUDGETS = (0.001, 0.003, 0.01)


def landing(bench: Bench, budgets: Sequence[float]) -> list[Job]:
    """Where trainings end that are controlled on as many prompts as it takes to know a KL to a tenth."""

    def run(inject: str, budget: float) -> Row:
        distiller = bench.distiller()
        distiller.held_out_targets, fresh = bench.many
        settings: dict[str, Any] = {"steps": bench.sizes.steps, "learning_rate": LEARNING_RATE, "kl_budget": budget}
        donor = bench.donor if inject == "donor" else None
        gates = distiller.learn(SCALE, inject=inject, donor=donor, **settings)
        divergences = {"fresh_kl": distiller.keep_kl(gates, fresh), "kl": bench.comparison.distiller.keep_kl(gates)}
        return {"notes": {"control_kl": gates.settings["held_out_kl"], **divergences, "prompts": fresh.questions}}

    grid = [(inject, budget) for inject in ("energy", "donor") for budget in LANDING_BUDGETS]
    return [Job("landing", {"inject": i, "budget": b}, partial(run, i, b)) for i, b in grid]


def _front(bench: Bench, inject: str) -> Row:
    """Points of one front with the KL on prompts that were neither trained on nor used for control."""
    donor = bench.donor if inject == "donor" else None
    points = pareto_front(
        bench.distiller(),
        FRONT,
        SCALE,
        donor=donor,
        first_steps=bench.sizes.steps,
        steps=max(1, bench.sizes.steps // 3),
        learning_rate=LEARNING_RATE,
    )
    rows = [
        {
            "budget": point.budget,
            "control_kl": point.held_out_kl,
            "fresh_kl": bench.comparison.distiller.keep_kl(point.gates, bench.fresh),
            "kl": bench.comparison.distiller.keep_kl(point.gates),
            "energy": point.energy,
        }
        for point in points
    ]
    return {"notes": {"front": rows}}
