"""`front`: injected energy against KL divergence, from gates for several budgets learned in one run, each warm-started.

Gates near 0 or 1 have almost no gradient, so training a neighbour's gates further does not reach the next budget. The
warm start is therefore the neighbour's logits, clamped to where training can move them and shifted by one constant so
that the KL is at the new budget before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlmgraft.distillation.budget import largest_within
from vlmgraft.distillation.curvature import within_reach
from vlmgraft.distillation.distributed import join_group
from vlmgraft.distillation.learn import (
    check_factors,
    check_kept,
    check_questions,
    kept_gates,
    learned_from,
    training_of,
)
from vlmgraft.distillation.loading import distiller_for
from vlmgraft.errors import OutputError, RecipeError
from vlmgraft.methods.frism import MEMORY_REMEDY, Frism
from vlmgraft.recipe.resolve import Job, RecipeSource, resolve
from vlmgraft.spectral.factor_store import open_store
from vlmgraft.spectral.gate_store import load_gates, save_gates
from vlmgraft.spectral.gates import Gates, injected_energy
from vlmgraft.storage.jsonl import read_json, read_rows, write_rows
from vlmgraft.storage.listed import listed
from vlmgraft.storage.locks import at_work, locked
from vlmgraft.storage.progress import Progress
from vlmgraft.storage.torchrun import agreed, barrier, process, rank_and_world

if TYPE_CHECKING:
    from vlmgraft.distillation.distill import Distiller
    from vlmgraft.distillation.targets import Targets

ROWS = "front.jsonl"
OTHER_FOLDER = "name another folder, or remove it first"
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
    """The front of KL divergence against injected energy: FRISM's gates for every budget, in ascending order.

    One teacher, one model and factors that `decompose` wrote; every point starts from its neighbour's gates
    (`distillation/front.py`). The largest budget trains for method.steps, the others for half as many. Writes a gates
    folder per budget into `out`, as the points are finished, and `out/front.jsonl`; points that an interrupted run of
    the same recipe and budgets left there are kept.

    Args:
        budgets: allowed KL divergence from the VLM in nats per token.
    Raises:
        RecipeError: there is no budget, one is not above 0, two share a folder, or the method is not frism, starts from
            curvature gates, or has a guarantee. CheckpointError: the factors are not this recipe's. DataError: the
            questions. OutputError: `out` holds other budgets, or gates of another recipe or of other factors.
    """
    check_budgets(budgets)
    if rank_and_world()[0] == 0:  # no other process writes before this one has joined
        _refuse_other_budgets(Path(out), budgets)
    changes = [f"method.kl_budget={max(budgets)}", "method.inject_weight=null", *listed(overrides)]
    job, out = resolve(recipe, changes), Path(out)
    method = job.method
    if not isinstance(method, Frism) or method.start == "curvature":
        raise RecipeError("method: a front starts each point from its neighbour; use frism without method.start")
    if method.budget_guarantee is not None:
        raise RecipeError("method.budget_guarantee: a front has none; remove it, or learn one budget with `gates`")
    check_kept(job, check_questions(job), out.with_name(out.name + ".teacher"))
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


def folder_name(budget: float) -> str:
    """The name of a budget's gates folder."""
    return f"{budget:g}"


def _refuse_other_budgets(out: Path, budgets: Sequence[float]) -> None:
    """Raise OutputError if `out` holds a front, finished or interrupted, of budgets that are not these."""
    left: list[float] = []
    if (out / ROWS).is_file():
        left = [float(row["budget"]) for row in read_rows(out / ROWS)]
    else:
        made_from = [read_json(file).get("from") for file in sorted(out.glob("*/gates.json"))]
        left = next((made["front"] for made in made_from if isinstance(made, dict) and "front" in made), left)
    if left and set(left) != set(budgets):
        old, new = (", ".join(map(str, sorted(set(some)))) for some in (left, budgets))
        raise OutputError(f"{out}: holds the front of the budgets {old}, not {new}; {OTHER_FOLDER}")


def read_path(folder: str | Path) -> dict[str, Gates]:
    """Gates by folder name: all that `front` wrote into the folder, from the smallest budget to the largest, or the one
    set in a gates folder. Raises CheckpointError."""
    folder, names = Path(folder), [""]
    if (folder / ROWS).is_file():
        names = [folder_name(budget) for budget in sorted(float(row["budget"]) for row in read_rows(folder / ROWS))]
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

    def kept() -> dict[float, Gates]:
        found = {}
        for budget in budgets:
            folder = out / folder_name(budget)
            gates = kept_gates(job, folder, **front_of)
            if gates is not None and gates.factors == store.digest:
                found[budget] = gates
            elif (folder / "gates.json").is_file():
                raise OutputError(f"{folder}: holds gates of another recipe or of other factors; {OTHER_FOLDER}")
        return found

    done = agreed(kept)
    made_from = {**learned_from(job), **front_of}
    barrier()

    def keep(point: FrontPoint) -> None:
        gates = replace(point.gates, settings={**point.gates.settings, "from": made_from}, factors=store.digest)
        if rank == 0:
            save_gates(gates, out / folder_name(point.budget))

    steps = {"first_steps": method.steps, "steps": max(1, method.steps // 2)}
    with distiller_for(job, store, out, progress if rank == 0 else None) as (distiller, donor):
        settings = {key: value for key, value in training_of(method, distiller).items() if key not in SET_BY_BUDGET}
        return pareto_front(distiller, budgets, method.scale, donor=donor, report=keep, done=done, **steps, **settings)


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
    """Learn gates for every budget with one distiller, from the largest to the smallest; returned in ascending order.

    donor: targets for donor matching; None: the energy term. first_steps: training steps at the largest budget; steps:
    at the others, which start from their neighbour's gates. report: called with every new point. done: gates by budget
    from an earlier run, not learned again. settings: other fields of `Training`, such as learning_rate and seed.
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
    """Raise RecipeError when there is no budget, one is not above 0, or two have one folder name."""
    if not budgets or not all(0 < budget < math.inf for budget in budgets):
        raise RecipeError(f"budgets: {list(budgets)} must be numbers above 0, at least one")
    for one, other in pairwise(sorted(set(budgets))):
        if folder_name(one) == folder_name(other):
            raise RecipeError(f"budgets: {one} and {other} share the folder {folder_name(one)}; leave one of them out")


def _point(budget: float, gates: Gates) -> FrontPoint:
    return FrontPoint(budget, gates.settings["held_out_kl"], gates.settings["energy"], gates)


def moved_to(distiller: Distiller, gates: Gates, budget: float) -> Gates:
    """The gates with all logits shifted by one constant within ±12 to the largest held-out KL within the budget.

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
