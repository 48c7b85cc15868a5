"""`front`: what drift buys in injected energy, by gates for a row of budgets from one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmgraft.alignment import Alignment
from vlmgraft.errors import RecipeError
from vlmgraft.learning import SETTINGS, check_factors, check_questions, distiller_for, gated_method, wanted_of
from vlmgraft.locks import at_work, locked
from vlmgraft.methods.frism import Frism
from vlmgraft.pipeline import LOWER, Progress, RecipeSource, pairs, read_recipe
from vlmgraft.recipe import Recipe
from vlmgraft.records import write_rows
from vlmgraft.spectral.donors import open_store
from vlmgraft.spectral.gates import Gates, load_gates
from vlmgraft.training.pareto import FrontPoint, check_budgets, pareto_front
from vlmgraft.training.processes import barrier, join_group, process

ROWS = "front.jsonl"
SET_BY_BUDGET = ("inject", "inject_weight", "kl_budget", "steps")


def front(
    recipe: RecipeSource,
    factors: str | Path,
    out: str | Path,
    budgets: Sequence[float],
    *,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[FrontPoint, ...]:
    """The front of drift against injected energy: FRISM's gates for every budget, in ascending order.

    One teacher, one model and factors that `decompose` wrote; every point starts from its neighbour's gates
    (`training/pareto.py`). The largest budget trains for method.steps, the others for half as many. Writes a gates
    folder per budget into `out`, as the points are finished, and `out/front.jsonl`; points that an interrupted run of
    the same recipe and budgets left there are kept.

    Args:
        budgets: allowed drift from the VLM in nats per token.
    Raises:
        RecipeError: there is no budget, one is not above 0, or the method starts elsewhere. CheckpointError: the
            factors are not this recipe's. DataError: the questions.
    """
    check_budgets(budgets)
    changes = [f"method.kl_budget={max(budgets)}", "method.inject_weight=null", *overrides]
    loaded, out = read_recipe(recipe, changes), Path(out)
    method = gated_method(loaded)
    if not isinstance(method, Frism) or method.start == "curvature":
        raise RecipeError("method: a front starts each point from its neighbour; use frism without method.start")
    alignments = pairs(loaded)
    check_questions(loaded, alignments)
    with at_work(out, "learning gates", LOWER), locked(factors, shared=True):
        check_factors(loaded, alignments, Path(factors))
        join_group()
        points = _points(loaded, method, alignments, Path(factors), out, budgets, progress)
        if process()[0] == 0:
            write_rows(
                out / ROWS,
                [{"budget": p.budget, "held_out_kl": p.held_out_kl, "energy": p.energy} for p in points],
            )
        barrier()
    return points


def _points(
    recipe: Recipe,
    method: Frism,
    alignments: Sequence[Alignment],
    factors: Path,
    out: Path,
    budgets: Sequence[float],
    progress: Progress | None,
) -> tuple[FrontPoint, ...]:
    rank, store = process()[0], open_store(factors, training=True)
    wanted = wanted_of(recipe, alignments) | {"front": sorted(budgets)}
    done: dict[float, Gates] = {}
    for budget in budgets:
        if (out / f"{budget:g}" / "gates.json").is_file():
            found = load_gates(out / f"{budget:g}")
            if found.factors == store.digest and found.settings.get("from") == wanted:
                done[budget] = found
    barrier()

    def keep(point: FrontPoint) -> None:
        gates = replace(point.gates, settings={**point.gates.settings, "from": wanted}, factors=store.digest)
        if rank == 0:
            gates.save(out / f"{point.budget:g}")

    distiller, donor = distiller_for(recipe, alignments, store, out, progress if rank == 0 else None)
    settings: dict[str, Any] = {key: getattr(method, key) for key in SETTINGS if key not in SET_BY_BUDGET}
    steps = {"first_steps": method.steps, "steps": max(1, method.steps // 2)}
    return pareto_front(distiller, budgets, method.scale, donor=donor, report=keep, done=done, **steps, **settings)
