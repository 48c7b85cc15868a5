"""`steer`: activation transfer from a donor of any architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlmgraft.cli.options import LoadsModels, Overrides, RecipeArgument, command


@command()
class Steer(LoadsModels):
    """A direction from a donor of any architecture, for `evaluate --steer`: no weights are changed."""

    recipe: RecipeArgument
    out: Annotated[Path, typer.Option("--out", "-o", help="safetensors file to write")]
    questions: Annotated[str, typer.Option(help="file of text questions; answers in it are not read")]
    overrides: Overrides = None
    contrast: Annotated[
        Literal["prompts", "answers"],
        typer.Option(
            help="ask for steps and for a direct answer; or the donor's answers with and without their thinking"
        ),
    ] = "prompts"
    samples: Annotated[int, typer.Option(help="the first so many questions", min=1)] = 100
    donor_layer: Annotated[int | None, typer.Option(help="counted from 0 [default: the middle one]")] = None
    vlm_layer: Annotated[int | None, typer.Option(help="counted from 0 [default: the middle one]")] = None
    kept: Annotated[float, typer.Option(help="share of the donor's frequencies that is kept, the lowest")] = 0.25
    strength: Annotated[float, typer.Option(help="length of what is added, in norms of the hidden state")] = 0.1
    max_new_tokens: Annotated[int, typer.Option(help="length of the donor's answers", min=1)] = 512
    batch_size: Annotated[int, typer.Option(help="questions at a time", min=1)] = 8

    def run(self) -> None:
        from vlmgraft.analysis.direction import steer

        with self.progress() as progress:
            made = steer(
                self.recipe, self.out, self.questions, contrast=self.contrast, samples=self.samples,
                donor_layer=self.donor_layer, vlm_layer=self.vlm_layer, kept=self.kept, strength=self.strength,
                max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, overrides=self.overrides or [],
                progress=progress,
            )  # fmt: skip
        facts = {"out": str(self.out), "layer": made.layer, "strength": made.strength, **made.made_from}
        self.show(facts, f"{self.out}: behind layer {made.layer}, strength {made.strength:g}, {self.elapsed()}")
