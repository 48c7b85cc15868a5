"""`ranks`: which singular directions carry what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import typer

from vlmgraft.cli.knockout import ExaminesDivergence
from vlmgraft.cli.options import Overrides, RecipeArgument, command
from vlmgraft.cli.output import show_table


@command()
class Ranks(ExaminesDivergence):
    """Which singular directions carry what: one band of them at a time, over λ."""

    recipe: RecipeArgument
    overrides: Overrides = None
    bands: Annotated[int, typer.Option(help="how many")] = 4
    scale: Annotated[str, typer.Option(help="values of λ: start:stop:step, or a,b,c")] = "0.5,1,2,3,4,6"
    by: Annotated[
        Literal["rank", "energy"], typer.Option(help="rank: equal numbers of directions; energy: equal shares of Σ s²")
    ] = "rank"

    def run(self) -> None:
        from vlmgraft.analysis.grid_points import parse_numbers
        from vlmgraft.analysis.rank_bands import peaks, ranks

        scales = parse_numbers("scale", self.scale)
        with self.progress() as progress:
            rows = ranks(
                self.recipe, self.out, self.questions(), overrides=self.overrides or [], bands=self.bands,
                scales=scales, by=self.by, resume=self.resume, progress=progress,
            )  # fmt: skip
        self.show({"rows": list(rows)}, lambda: _print_peaks(peaks(rows)))


def _print_peaks(best: Sequence[Mapping[str, Any]]) -> None:
    """One line per band: where it peaks."""
    keys = ("energy", "scale", "injected", "reasoning", "perception")
    show_table(
        "best reasoning of every band of singular directions, % right [95 %]",
        ("band", "share of energy", "λ at the peak", "λ·‖band‖/‖τ‖", "reasoning", "perception"),
        [
            ("all" if row["band"] is None else f"{row['band'] + 1} of {row['of']}", *(row[key] for key in keys))
            for row in best
        ],
    )
