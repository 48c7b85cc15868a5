"""`sweep`: perception against reasoning over a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmgraft.cli.knockout import ExaminesDivergence
from vlmgraft.cli.options import command
from vlmgraft.cli.output import show_table


@command()
class Sweep(ExaminesDivergence):
    """Perception against reasoning over a grid of recipe fields, with the Pareto front."""

    recipes: Annotated[list[Path], typer.Argument(help="one or several recipes of one VLM")]
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="[recipe:]key=start:stop:step or …=a,b,c; repeatable")
    ] = None

    def run(self) -> None:
        from vlmgraft.analysis.recipe_sweep import sweep

        with self.progress() as progress:
            rows = sweep(
                _by_name(self.recipes),
                self.grid or [],
                self.out,
                self.questions(),
                resume=self.resume,
                progress=progress,
            )
        columns = ("method", "setting", "reasoning", "perception", "KL", "front")
        keys = ("method", "setting", "reasoning", "perception", "kl")
        table = [(*(row[key] for key in keys), "*" if row["front"] else "") for row in rows]
        title = "points, % right [95 %]; * on the Pareto front"
        self.show({"rows": list(rows)}, lambda: show_table(title, columns, table))


def _by_name(recipes: list[Path]) -> dict[str, Any]:
    """Recipes by the name of their method, or of their file if two have the same method."""
    from vlmgraft.errors import RecipeError
    from vlmgraft.recipe.model import load_recipe

    loaded = [(path, load_recipe(path)) for path in recipes]
    methods = [str(recipe.method.name) for _, recipe in loaded]
    names = [
        method if methods.count(method) == 1 else path.stem for (path, _), method in zip(loaded, methods, strict=True)
    ]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"sweep: two recipes would both be called {twice!r}; give their files different names")
    return dict(zip(names, (recipe for _, recipe in loaded), strict=True))
