"""`front`: what drift buys in injected energy, by gates for a row of budgets from one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlmgraft.distillation.distributed import agreed, barrier, join_group, process
from vlmgraft.distillation.learn import (
    check_factors,
    check_questions,
    distiller_for,
    kept_gates,
    learned_from,
    training_of,
)
from vlmgraft.distillation.pareto import FrontPoint, check_budgets, pareto_front
from vlmgraft.errors import RecipeError
from vlmgraft.methods.frism import MEMORY_REMEDY, Frism
from vlmgraft.recipe.resolve import Job, RecipeSource, resolve
from vlmgraft.spectral.factor_store import open_store
from vlmgraft.spectral.gate_store import load_gates, save_gates
from vlmgraft.spectral.gates import Gates
from vlmgraft.storage.jsonl import read_rows, write_rows
from vlmgraft.storage.locks import at_work, locked
from vlmgraft.storage.progress import Progress

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
    (`distillation/pareto.py`). The largest budget trains for method.steps, the others for half as many. Writes a gates
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
    job, out = resolve(recipe, changes), Path(out)
    method = job.method
    if not isinstance(method, Frism) or method.start == "curvature":
        raise RecipeError("method: a front starts each point from its neighbour; use frism without method.start")
    if method.budget_guarantee is not None:
        raise RecipeError("method.budget_guarantee: a front has none; remove it, or learn one budget with `gates`")
    check_questions(job)
    inputs, kept = [*job.folders, factors], [ROWS, "[0-9.]*"]
    with at_work(out, "learning gates", MEMORY_REMEDY, inputs, kept), locked(factors, shared=True):
        check_factors(job, Path(factors))
        join_group()
        points = _points(job, method, Path(factors), out, budgets, progress)
        if process()[0] == 0:
            write_rows(
                out / ROWS,
                [{"budget": p.budget, "held_out_kl": p.held_out_kl, "energy": p.energy} for p in points],
            )
        barrier()
    return points


def read_path(folder: str | Path) -> dict[str, Gates]:
    """The gates of a folder that `front` wrote, from the smallest budget to the largest, or the one of a gates folder;
    by the names of their folders. Raises CheckpointError."""
    folder, names = Path(folder), [""]
    if (folder / ROWS).is_file():
        names = [f"{budget:g}" for budget in sorted(float(row["budget"]) for row in read_rows(folder / ROWS))]
    return {(folder / name).name: load_gates(folder / name) for name in names}


def _points(
    job: Job,
    method: Frism,
    factors: Path,
    out: Path,
    budgets: Sequence[float],
    progress: Progress | None,
) -> tuple[FrontPoint, ...]:
    rank, store = process()[0], open_store(factors, training=True)
    front_of = {"front": sorted(budgets)}
    kept = agreed(lambda: {budget: kept_gates(job, out / f"{budget:g}", **front_of) for budget in budgets})
    done = {budget: gates for budget, gates in kept.items() if gates is not None and gates.factors == store.digest}
    made_from = {**learned_from(job), **front_of}
    barrier()

    def keep(point: FrontPoint) -> None:
        gates = replace(point.gates, settings={**point.gates.settings, "from": made_from}, factors=store.digest)
        if rank == 0:
            save_gates(gates, out / f"{point.budget:g}")

    distiller, donor = distiller_for(job, store, out, progress if rank == 0 else None)
    settings = {key: value for key, value in training_of(method, distiller).items() if key not in SET_BY_BUDGET}
    steps = {"first_steps": method.steps, "steps": max(1, method.steps // 2)}
    return pareto_front(distiller, budgets, method.scale, donor=donor, report=keep, done=done, **steps, **settings)
