"""`decompose`: the singular value decomposition of the donor's task vector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmgraft.cli.options import Distributed, LoadsModels, Overrides, RecipeArgument, Resumable, command


@command()
class Decompose(Distributed, LoadsModels, Resumable):
    """SVD of the donor's task vector, one file per matrix; also under torchrun."""

    recipe: RecipeArgument
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write; factors of the same inputs are kept")]
    overrides: Overrides = None

    def run(self) -> None:
        from vlmgraft import pipeline

        with self.progress() as progress:
            store = pipeline.decompose(
                self.recipe, self.out, overrides=self.overrides or [], resume=self.resume, progress=progress
            )
        summary = {"out": str(self.out), "matrices": len(store), "kept": store.kept}
        self.show(summary, f"{self.out}: {len(store)} matrices, {store.kept:.1%} of ‖τ‖², {self.elapsed()}")
