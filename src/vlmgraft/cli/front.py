"""`front`: gates for a row of budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmgraft.cli.app import AsJson, Quiet, RecipeArgument, Set, app, progress_bar
from vlmgraft.cli.tables import show_rows, show_table


@app.command()
def front(
    recipe: RecipeArgument,
    factors: Annotated[Path, typer.Option(help="folder that `decompose` wrote")],
    out: Annotated[Path, typer.Option("--out", help="folder to write; what it holds of this front is kept")],
    budgets: Annotated[str, typer.Option(help="nats per token: start:stop:step, or a,b,c")],
    overrides: Set = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Gates for a row of KL budgets in one run: what drift buys in injected energy."""
    from vlmgraft.analysis.grid import parse_grid
    from vlmgraft.studies import front as run

    wanted = [float(value) for value in parse_grid(f"budgets={budgets}")[1]]
    with progress_bar(quiet) as progress:
        points = run(recipe, factors, out, wanted, overrides=overrides or [], progress=progress)
    rows = [(point.budget, point.held_out_kl, point.energy) for point in points]
    names = ("budget", "held_out_kl", "energy")
    if as_json:
        show_rows(dict(zip(names, row, strict=True)) for row in rows)
    else:
        show_table("Drift in nats per token, and the share of the task vector's energy", names, rows)
