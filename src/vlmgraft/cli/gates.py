"""`gates`: FRISM's second stage, or curvature gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmgraft.cli.options import Distributed, LoadsModels, Overrides, RecipeArgument, Writes, command


@command(name="gates")
class GatesCommand(Distributed, LoadsModels, Writes):
    """Learn gates on factors; also under torchrun. An interrupted run in --out is resumed."""

    recipe: RecipeArgument
    factors: Annotated[Path, typer.Option(help="folder that `decompose` wrote")]
    overrides: Overrides = None

    def run(self) -> None:
        from vlmgraft import pipeline

        with self.progress() as progress:
            learned = pipeline.gates(
                self.recipe, self.factors, self.out, overrides=self.overrides or [], progress=progress
            )
        count = len(learned.logits)
        summary = {"out": str(self.out), "matrices": count, "settings": dict(learned.settings)}
        self.show(summary, f"{self.out}: gates of {count} matrices, {self.elapsed()}")
