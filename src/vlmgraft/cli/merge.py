"""`merge`, `decompose`, `gates`, `export`: from recipes to merged folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmgraft.cli.app import AsJson, Out, Quiet, RecipeArgument, Set, app, progress_bar


@app.command()
def merge(
    recipe: Annotated[Path | None, typer.Argument(help="recipe in YAML")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder to write; must not exist")] = None,
    overrides: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan, write nothing")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what an interruption left")] = False,
    workdir: Annotated[Path | None, typer.Option(help="keep and reuse factors and gates here")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the recipe's JSON schema")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge as the recipe says, to a finished checkpoint."""
    from vlmgraft import pipeline
    from vlmgraft.errors import RecipeError
    from vlmgraft.recipe import json_schema

    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
        return
    if recipe is None:
        raise RecipeError("merge: give a recipe")
    loaded = pipeline.read_recipe(recipe, overrides or [])
    for note in loaded.notes:
        typer.echo(note, err=True)
    if dry_run:
        show_plan(pipeline.plan(loaded, pipeline.pair(loaded, headers_only=True)), as_json)
        return
    if out is None:
        raise RecipeError("merge: --out is missing; name the folder to write")
    with progress_bar(quiet) as progress:
        receipt = pipeline.merge(loaded, out, resume=resume, workdir=workdir, progress=progress)
    verdicts = [tensor.verdict for tensor in receipt.tensors]
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(receipt)))
    else:
        typer.echo(f"{out}: {verdicts.count('merged')} of {len(verdicts)} tensors merged, {receipt.seconds:.1f} s")
        for note in receipt.notes:
            typer.echo(note)


@app.command()
def decompose(
    recipe: RecipeArgument,
    out: Out,
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what an interruption left")] = False,
    quiet: Quiet = False,
) -> None:
    """SVD of the donor's task vector, one file per matrix."""
    from vlmgraft import pipeline

    with progress_bar(quiet) as progress:
        store = pipeline.decompose(recipe, out, overrides=overrides or [], resume=resume, progress=progress)
    typer.echo(f"{out}: {len(store)} matrices")


@app.command()
def gates(
    recipe: RecipeArgument,
    factors: Annotated[Path, typer.Option(help="folder that `decompose` wrote")],
    out: Out,
    overrides: Set = None,
    quiet: Quiet = False,
) -> None:
    """Learn FRISM's gates on factors."""
    from vlmgraft import pipeline

    with progress_bar(quiet) as progress:
        learned = pipeline.gates(recipe, factors, out, overrides=overrides or [], progress=progress)
    typer.echo(f"{out}: gates of {len(learned.logits)} matrices")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="merged folder (hub) or gates folder (lora)")],
    to: Annotated[str, typer.Option("--to", help="lora or hub")],
    out: Annotated[Path | None, typer.Option("--out", help="adapter folder to write")] = None,
    factors: Annotated[Path | None, typer.Option(help="factors of the gates")] = None,
    vlm: Annotated[str | None, typer.Option(help="the VLM the adapter applies to")] = None,
    rank: Annotated[int, typer.Option(help="of the adapter")] = 64,
    name: Annotated[str | None, typer.Option(help="organisation/name on the hub")] = None,
    public: Annotated[bool, typer.Option("--public", help="a hub repository that all can see")] = False,
) -> None:
    """Push a merged folder to the hub, or write gates as a LoRA adapter."""
    from vlmgraft import pipeline
    from vlmgraft.errors import RecipeError

    if to not in ("lora", "hub"):
        raise RecipeError(f"--to {to!r}: write lora or hub")
    place: Any = to
    made = pipeline.export(source, place, out=out, factors=factors, vlm=vlm, rank=rank, name=name, private=not public)
    typer.echo(json.dumps(made, default=str))


def show_plan(plan: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(plan)))
        return
    for row in plan.tensors:
        typer.echo(f"{row['verdict']:9}{row['name']}  {row['dtype']} {row['shape']}  {row['reason']}")
    typer.echo(f"{plan.family}, {plan.layers} layers: {plan.merged} merged, {plan.excluded} excluded, {plan.kept} kept")
    typer.echo(f"the merged folder holds all {len(plan.tensors)} tensors of the VLM, {plan.nbytes:,} bytes")
    if plan.cost is not None:
        cost = plan.cost
        typer.echo(
            f"reads {cost.read:,} bytes, writes {cost.files} file(s); about {cost.seconds:.1f} s at {cost.rate:,} B/s, "
            f"{cost.memory / 1e6:.0f} MB of memory beside the libraries"
        )
    for note in plan.notes:
        typer.echo(f"note: {note}")
