"""`front`: gates for a row of budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmgraft.cli.options import Distributed, LoadsModels, Overrides, RecipeArgument, Writes, command
from vlmgraft.cli.output import show_table


@command()
class Front(Distributed, LoadsModels, Writes):
    """Gates for a row of KL budgets in one run: what KL from the VLM buys in injected energy."""

    recipe: RecipeArgument
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write; what it holds of this front is kept")]
    factors: Annotated[Path, typer.Option(help="folder that `decompose` wrote")]
    budgets: Annotated[str, typer.Option(help="nats per token: start:stop:step, or a,b,c")]
    overrides: Overrides = None

    def run(self) -> None:
        from vlmgraft.analysis.grid_points import parse_numbers
        from vlmgraft.distillation.front import front

        budgets = parse_numbers("budgets", self.budgets)
        with self.progress() as progress:
            points = front(
                self.recipe, self.factors, self.out, budgets, overrides=self.overrides or [], progress=progress
            )
        names = ("budget", "held_out_kl", "energy")
        rows = [(point.budget, point.held_out_kl, point.energy) for point in points]
        title = "KL in nats per token, and the share of the task vector's energy"
        self.show(
            {"rows": [dict(zip(names, row, strict=True)) for row in rows]}, lambda: show_table(title, names, rows)
        )
