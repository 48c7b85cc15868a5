"""`merge`: from a recipe to a finished checkpoint, or with --dry-run to the cost of making it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmgraft.cli.options import LoadsModels, Overrides, Resumable, command
from vlmgraft.cli.output import duration, show_table, size


@command()
class Merge(LoadsModels, Resumable):
    """Merge as the recipe says, to a finished checkpoint."""

    recipe: Annotated[Path | None, typer.Argument(help="recipe in YAML")] = None
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder to write; must not exist")] = None  # type: ignore[assignment]
    overrides: Overrides = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="try every input, show what each stage takes, write nothing")
    ] = False
    workdir: Annotated[Path | None, typer.Option(help="keep and reuse factors and gates here")] = None
    schema: Annotated[bool, typer.Option("--schema", help="print the recipe's JSON schema")] = False

    def replaced(self) -> Path | None:
        """The output that this run may replace: None if the run writes nothing."""
        return None if self.dry_run or self.schema else super().replaced()

    def run(self) -> None:
        from vlmgraft import pipeline
        from vlmgraft.errors import RecipeError
        from vlmgraft.recipe.schema import json_schema

        if self.schema:
            typer.echo(json.dumps(json_schema(), indent=2))
            return
        if self.recipe is None:
            raise RecipeError("merge: give a recipe")
        recipe = pipeline.read_recipe(self.recipe, self.overrides or [])
        for note in recipe.notes:
            self.note(note)
        if self.dry_run:
            self._rehearse(recipe)
            return
        if self.out is None:
            raise RecipeError("merge: --out is missing; name the folder to write")
        with self.progress() as progress:
            receipt = pipeline.merge(
                recipe, self.out, resume=self.resume, workdir=self.workdir, threads=self.threads, progress=progress
            )
        self.show(receipt, lambda: self._print_receipt(receipt))

    def _rehearse(self, recipe: Any) -> None:
        """Show the plan and the cost of every stage; exit code 2 if something would fail."""
        from vlmgraft.costs.dry_run import dry_run

        rehearsal = dry_run(
            recipe, self.out, self.workdir, tell=lambda fault: typer.echo(f"vlmgraft: {fault}", err=True)
        )
        result = dict(vars(rehearsal))
        self.show({**vars(result.pop("plan")), **result}, lambda: _print_rehearsal(rehearsal))
        if rehearsal.faults:
            raise typer.Exit(2)

    def _print_receipt(self, receipt: Any) -> None:
        verdicts = [tensor.verdict for tensor in receipt.tensors]
        typer.echo(f"{self.out}: {verdicts.count('merged')} of {len(verdicts)} tensors merged, {self.elapsed()}")
        typer.echo(receipt.survival.line())
        for note in receipt.notes:
            typer.echo(note)


def _print_rehearsal(rehearsal: Any) -> None:
    print_plan(rehearsal.plan)
    columns = ("stage", "time", "GPU memory", "host memory", "disk", "already there")
    rows = [
        (row.name, duration(row.seconds), *map(size, (row.gpu_memory, row.host_memory, row.disk)), row.done)
        for row in rehearsal.stages
    ]
    total = sum(stage.seconds for stage in rehearsal.stages)
    disk = sum(stage.disk for stage in rehearsal.stages)
    rows.append(("all", duration(total), "", "", size(disk), ""))
    show_table(f"expected on {rehearsal.device}, disk at 1 GB/s", columns, rows)
    for note in rehearsal.notes:
        typer.echo(f"note: {note}")


def print_plan(plan: Any) -> None:
    """Print every tensor with its verdict, then the totals."""
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
