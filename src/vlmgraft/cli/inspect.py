"""`inspect`: what pairs with what, how far the models moved, and whether perception would survive a merge."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmgraft.cli.merge import print_plan
from vlmgraft.cli.options import LoadsModels, Overrides, command
from vlmgraft.cli.output import show_table

LIKELY = 0.8
"""A predicted chance. Of the recorded pairs with this chance or more, perception held in 42 of 43."""
Model = Annotated[str | None, typer.Option(help="folder or hub id")]


@command()
class Inspect(LoadsModels):
    """What pairs with what, from headers alone; --distances reads the weights, --data asks the VLM."""

    recipe: Annotated[Path | None, typer.Argument(help="recipe in YAML")] = None
    overrides: Overrides = None
    vlm: Model = None
    donor: Model = None
    donor_base: Annotated[
        list[str] | None, typer.Option(help="folder or hub id; several, with --distances: which one is it?")
    ] = None
    vlm_base: Model = None
    distances: Annotated[
        bool, typer.Option("--distances", help="read the weights: norms and cosines of both task vectors")
    ] = False
    spectra: Annotated[bool, typer.Option("--spectra", help="with --distances: singular values of the task vector")] = (
        False
    )
    out: Annotated[Path | None, typer.Option("--out", "-o", help="with --distances: folder for the rows")] = None
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="question file or data set: KL of task arithmetic at several λ; would perception hold?"
        ),
    ] = None
    max_new_tokens: Annotated[int, typer.Option(help="with --data: length of the VLM's answers", min=1)] = 64
    batch_size: Annotated[int, typer.Option(help="with --data: questions at a time", min=1)] = 16

    def run(self) -> None:
        recipe = self._recipe()
        if self.data is not None:
            self._predict(recipe, self.data)
            return
        if not self.distances:
            self._show_headers(recipe)
            return
        from vlmgraft.analysis import inspect_weights

        with self.progress() as progress:
            bases = self.donor_base or []
            result = inspect_weights(recipe, bases=bases, spectra=self.spectra, out=self.out, progress=progress)
        self.show(result, lambda: _print_inspection(result))

    def _recipe(self) -> Any:
        from vlmgraft.errors import RecipeError
        from vlmgraft.recipe.model import load_recipe

        if self.recipe is None and not (self.vlm and self.donor):
            raise RecipeError("inspect: give a recipe, or --vlm and --donor (and --donor-base)")
        bases = self.donor_base or []
        if not self.distances and (self.spectra or self.out or len(bases) > 1):
            raise RecipeError("inspect: --spectra, --out and several --donor-base need --distances")
        if self.data is not None and self.distances:
            raise RecipeError("inspect: --distances and --data are two questions; ask one at a time")
        if self.recipe and (self.vlm or self.donor or self.vlm_base or (bases and not self.distances)):
            raise RecipeError("inspect: a recipe names its models; write such as --set vlm=FOLDER to try others")
        models = {"vlm": self.vlm, "donor": self.donor, "donor_base": bases[0] if bases else None}
        models["vlm_base"] = self.vlm_base
        source = self.recipe or {key: value for key, value in models.items() if value}
        return load_recipe(source, self.overrides or [], need_method=False)

    def _predict(self, recipe: Any, data: str) -> None:
        """Show the KL and the chance at every λ, and the largest λ at which perception most likely holds."""
        from vlmgraft.analysis import predict_perception

        with self.progress() as progress:
            rows = predict_perception(
                recipe, data, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, progress=progress
            )
        held = [*takewhile(lambda row: row.holds >= LIKELY, rows)]
        safe = held[-1].scale if held else None
        verdict = (
            f"perception will most likely hold up to λ {safe:g}" if safe else "at none of them will it most likely hold"
        )

        def show() -> None:
            columns = ("λ", "KL, nats per token", "chance that perception falls by 2 points at most")
            show_table("task arithmetic", columns, [(f"{row.scale:g}", row.kl, f"{row.holds:.2f}") for row in rows])
            typer.echo(
                f"{verdict} (a chance of {LIKELY} or more); docs/explanation/rules.md has the record of such chances"
            )

        self.show({"rows": rows, "holds_up_to": safe}, show)

    def _show_headers(self, recipe: Any) -> None:
        """Show the plan, and the differences between the models' configs and headers."""
        from vlmgraft import pipeline
        from vlmgraft.analysis.inspection import differences

        alignment = pipeline.pair(recipe, headers_only=True)
        plan, differing = pipeline.plan(recipe, alignment), differences(alignment)

        def show() -> None:
            print_plan(plan)
            for row in differing:
                typer.echo(
                    f"{row.weight}: {row.field} is {row.vlm} in the VLM, {row.theirs} in {row.other}: {row.meaning}"
                )

        self.show({**vars(plan), "differences": differing}, show)


def _print_inspection(result: Any) -> None:
    columns = ("layer", "group", "‖W‖", "‖τ‖", "‖τ‖/‖W‖", "‖τ_vlm‖", "cosine", "zeros of τ")
    keys = ("group", "weight_norm", "donor_norm", "ratio", "vlm_norm", "cosine", "unchanged")
    rows = [("-" if row["layer"] is None else str(row["layer"]), *(row[key] for key in keys)) for row in result.rows]
    show_table("distances", columns, rows)
    if result.spectra:
        columns = ("matrix", "‖τ‖", "effective rank", "stable rank", "first 1", "first 8", "first 64", "of")
        rows = [
            (row.name, row.norm, row.effective_rank, row.stable_rank, *row.first.values(), min(row.shape))
            for row in result.spectra
        ]
        show_table("spectra of τ", columns, rows)
    if result.differences:
        rows = [(row.field, row.other, row.vlm, row.theirs, row.weight, row.meaning) for row in result.differences]
        show_table("differences", ("field", "checkpoint", "VLM", "theirs", "weight", "meaning"), rows)
    typer.echo(f"base: {result.base}")
    typer.echo(f"distances: {result.extent}")
