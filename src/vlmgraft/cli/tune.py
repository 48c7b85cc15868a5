"""`tune`: supervised fine-tuning, with the donor's direction as a prior on the gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vlmgraft.cli.app import AsJson, Set, app


@app.command()
def tune(
    recipe: Annotated[Path | None, typer.Argument(help="tune recipe in YAML")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder to write; must not exist")] = None,
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint of this recipe")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="print the recipe's JSON schema")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a VLM on traces with images, with DRIFT's prior (or without); also under torchrun."""
    from vlmgraft.errors import RecipeError

    if schema:
        from vlmgraft.recipe.tune import TuneRecipe

        typer.echo(json.dumps(TuneRecipe.model_json_schema(), indent=2))
        return
    if recipe is None or out is None:
        raise RecipeError("tune: give a recipe and --out, the folder to write")
    from vlmgraft import tuning

    tuned = tuning.tune(recipe, out, overrides=overrides or [], resume=resume)
    pushed = sum(verdict.verdict == "pushed" for verdict in tuned.verdicts)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "steps": tuned.steps, "loss": tuned.loss, "pushed": pushed}))
    else:
        typer.echo(f"{out}: {tuned.steps} steps, mean loss {tuned.loss:.4f}, {pushed} tensors pushed")
