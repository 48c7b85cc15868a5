"""`tune`: supervised fine-tuning, with the donor's direction as a prior on the gradients."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Literal

import typer

from vlmgraft.cli.options import Distributed, LoadsModels, Overrides, Resumable, command, environment, nested


@command()
class Tune(Distributed, LoadsModels, Resumable):
    """Fine-tune a VLM on traces with images, with DRIFT's prior (or without); also under torchrun."""

    recipe: Annotated[Path | None, typer.Argument(help="tune recipe in YAML")] = None
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder to write; must not exist")] = None  # type: ignore[assignment]
    overrides: Overrides = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="of the weights while they are trained; auto: the recipe's"),
    ] = "auto"  # type: ignore[assignment]
    schema: Annotated[bool, typer.Option("--schema", help="print the recipe's JSON schema")] = False

    def around(self) -> AbstractContextManager[object]:
        """The trainer uses all visible GPUs; for `cuda:1`, only the second GPU is made visible."""
        kind, _, number = (self.device or "").partition(":")
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if kind != "cuda" or not number.isdecimal():
            return super().around()
        one = seen[int(number)] if int(number) < len(seen) and seen[0] else number
        self.device = kind
        return nested(environment(CUDA_VISIBLE_DEVICES=one), super().around())

    def run(self) -> None:
        from vlmgraft.errors import RecipeError

        if self.schema:
            from vlmgraft.recipe.tune import TuneRecipe

            typer.echo(json.dumps(TuneRecipe.model_json_schema(), indent=2))
            return
        if self.recipe is None or self.out is None:
            raise RecipeError("tune: give a recipe and --out, the folder to write")
        from vlmgraft.finetuning.tune import tune

        overrides = [*(self.overrides or []), *([] if self.dtype == "auto" else [f"dtype={self.dtype}"])]
        with self.progress() as progress:
            tuned = tune(self.recipe, self.out, overrides=overrides, resume=self.resume, progress=progress)
        pushed = sum(verdict.verdict == "pushed" for verdict in tuned.verdicts)
        self.show(
            {"out": str(self.out), "steps": tuned.steps, "loss": tuned.loss, "pushed": pushed},
            f"{self.out}: {tuned.steps} steps, mean loss {tuned.loss:.4f}, {pushed} tensors pushed, {self.elapsed()}",
        )
