"""`inspect`, `knockout`, `ranks`, `sweep`: what carries what, and is merging safe."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmgraft.cli.app import AsJson, Quiet, RecipeArgument, Set, app, progress_bar
from vlmgraft.cli.merge import show_plan
from vlmgraft.cli.tables import (
    distances_table,
    knockout_table,
    ranks_table,
    show_rows,
    show_table,
    spectra_table,
    sweep_table,
)

Data = Annotated[
    list[str] | None,
    typer.Option("--data", help="lab, or what `evaluate` reads: question file, data set, benchmark; repeatable"),
]
Reasoning = Annotated[
    list[str] | None, typer.Option("--reasoning", help="a category or task that counts as reasoning; repeatable")
]
Samples = Annotated[int | None, typer.Option("--samples", help="ask at most so many questions (of the lab: sums)")]
Drift = Annotated[str | None, typer.Option("--drift", help="question file on which the KL from the VLM is measured")]
Tokens = Annotated[int | None, typer.Option("--max-new-tokens", help="length of an answer; default: the data's")]
Batch = Annotated[int, typer.Option("--batch-size", help="questions at a time")]
Split = Annotated[str, typer.Option("--split", help="of the lab: validation or test")]
Seed = Annotated[int, typer.Option("--seed", help="of the lab's questions")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the rows that are there")]
Folder = Annotated[Path, typer.Option("--out", help="folder for the rows")]


@app.command()
def inspect(
    recipe: Annotated[Path | None, typer.Argument(help="recipe in YAML")] = None,
    vlm: Annotated[str | None, typer.Option(help="folder or hub id")] = None,
    donor: Annotated[str | None, typer.Option(help="folder or hub id")] = None,
    donor_base: Annotated[
        list[str] | None, typer.Option(help="folder or hub id; several, with --distances: which one is it?")
    ] = None,
    vlm_base: Annotated[str | None, typer.Option(help="folder or hub id")] = None,
    distances: Annotated[
        bool, typer.Option("--distances", help="read the weights: norms, cosines, is merging safe?")
    ] = False,
    spectra: Annotated[
        bool, typer.Option("--spectra", help="with --distances: singular values of the task vector")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="with --distances: folder for the rows")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """What pairs with what, from headers alone; --distances reads the weights too."""
    from vlmgraft.errors import RecipeError
    from vlmgraft.recipe import load_recipe

    if recipe is None and not (vlm and donor):
        raise RecipeError("inspect: give a recipe, or --vlm and --donor (and --donor-base)")
    bases = donor_base or []
    given = {"vlm": vlm, "donor": donor, "donor_base": bases[0] if bases else None, "vlm_base": vlm_base}
    source = recipe or {key: value for key, value in given.items() if value}
    loaded = load_recipe(source, need_method=False)
    if not distances:
        if spectra or out or len(bases) > 1:
            raise RecipeError("inspect: --spectra, --out and several --donor-base need --distances")
        _show_headers(loaded, as_json)
        return
    from vlmgraft.studies import inspect_weights

    with progress_bar(quiet) as progress:
        found = inspect_weights(loaded, bases=bases, spectra=spectra, out=out, progress=progress)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), ensure_ascii=False))
        return
    distances_table(found.rows)
    if found.spectra:
        spectra_table(found.spectra)
    if found.differences:
        rows = [(one.field, one.other, one.vlm, one.theirs, one.weight, one.meaning) for one in found.differences]
        show_table("differences", ("field", "checkpoint", "VLM", "theirs", "weight", "meaning"), rows)
    typer.echo(f"base: {found.base}")
    typer.echo(f"verdict: {found.verdict.level}: {found.verdict.reason}")


def _show_headers(recipe: Any, as_json: bool) -> None:
    """The plan, and what configs and headers say the models do not share."""
    from vlmgraft import pipeline
    from vlmgraft.analysis.differences import differences

    alignment = pipeline.pair(recipe, headers_only=True)
    plan, found = pipeline.plan(recipe, alignment), differences(alignment)
    if as_json:
        rows = [dataclasses.asdict(one) for one in found]
        typer.echo(json.dumps({**dataclasses.asdict(plan), "differences": rows}))
        return
    show_plan(plan, as_json)
    for one in found:
        typer.echo(f"{one.weight}: {one.field} is {one.vlm} in the VLM, {one.theirs} in {one.other}: {one.meaning}")


@app.command()
def knockout(
    model: Annotated[str, typer.Argument(help="merged folder, or any supported VLM")],
    out: Folder,
    data: Data = None,
    vlm: Annotated[str | None, typer.Option(help="the VLM it was merged from; default: its recipe.yaml's")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="this model by itself, no VLM beside it")] = False,
    layers: Annotated[str, typer.Option(help="all, a number, or a range such as 0-5")] = "all",
    part: Annotated[list[str] | None, typer.Option(help="attention, mlp or both; repeatable")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="constant, zero, mean, restore or only; repeatable")] = None,
    reasoning: Reasoning = None,
    samples: Samples = None,
    max_new_tokens: Tokens = None,
    batch_size: Batch = 16,
    split: Split = "validation",
    seed: Seed = 0,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Which layer carries what: knock out every layer's attention, mlp and both."""
    from vlmgraft.analysis.blocks import MODES, PARTS
    from vlmgraft.studies import knockout as run

    chosen: dict[str, Any] = {"parts": part or PARTS, "modes": mode or MODES}
    asked = _asked(data, reasoning, samples, None, max_new_tokens, batch_size, split, seed)
    with progress_bar(quiet) as progress:
        rows = run(model, out, asked, vlm=vlm, alone=alone, layers=layers, resume=resume, progress=progress, **chosen)
    show_rows(rows) if as_json else knockout_table(rows)


@app.command()
def ranks(
    recipe: RecipeArgument,
    out: Folder,
    data: Data = None,
    overrides: Set = None,
    bands: Annotated[int, typer.Option(help="how many")] = 4,
    scale: Annotated[str, typer.Option(help="values of λ: start:stop:step, or a,b,c")] = "0.5,1,2,3,4,6",
    by: Annotated[str, typer.Option(help="rank: equal numbers of directions; energy: equal shares of Σ s²")] = "rank",
    reasoning: Reasoning = None,
    samples: Samples = None,
    drift: Drift = None,
    max_new_tokens: Tokens = None,
    batch_size: Batch = 16,
    split: Split = "validation",
    seed: Seed = 0,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Which singular directions carry what: one band of them at a time, over λ."""
    from vlmgraft.analysis.grid import parse_grid
    from vlmgraft.analysis.ranks import peaks
    from vlmgraft.studies import ranks as run

    cut: Any = by
    scales = [float(value) for value in parse_grid(f"scale={scale}")[1]]
    asked = _asked(data, reasoning, samples, drift, max_new_tokens, batch_size, split, seed)
    with progress_bar(quiet) as progress:
        rows = run(
            recipe,
            out,
            asked,
            overrides=overrides or [],
            bands=bands,
            scales=scales,
            by=cut,
            resume=resume,
            progress=progress,
        )
    show_rows(rows) if as_json else ranks_table(peaks(rows))


@app.command()
def sweep(
    recipes: Annotated[list[Path], typer.Argument(help="one or several recipes of one VLM")],
    out: Folder,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="[recipe:]key=start:stop:step or …=a,b,c; repeatable")
    ] = None,
    data: Data = None,
    reasoning: Reasoning = None,
    samples: Samples = None,
    drift: Drift = None,
    max_new_tokens: Tokens = None,
    batch_size: Batch = 16,
    split: Split = "validation",
    seed: Seed = 0,
    resume: Resume = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Perception against reasoning over a grid of recipe fields, with the Pareto front."""
    from vlmgraft.studies import sweep as run

    asked = _asked(data, reasoning, samples, drift, max_new_tokens, batch_size, split, seed)
    with progress_bar(quiet) as progress:
        rows = run(_named(recipes), grid or [], out, asked, resume=resume, progress=progress)
    show_rows(rows) if as_json else sweep_table(rows)


def _asked(
    data: list[str] | None,
    reasoning: list[str] | None,
    samples: int | None,
    drift: str | None,
    max_new_tokens: int | None,
    batch_size: int,
    split: str,
    seed: int,
) -> Any:
    from vlmgraft.errors import RecipeError
    from vlmgraft.studies import Asked

    if split not in ("validation", "test"):
        raise RecipeError(f"--split {split!r}: write validation or test")
    wanted = tuple(reasoning) if reasoning else None
    return Asked(tuple(data or ["lab"]), wanted, samples, drift, max_new_tokens, batch_size, split, seed)


def _named(recipes: list[Path]) -> dict[str, Any]:
    """Recipes by their method's name, or by their file's where two have one method."""
    from vlmgraft.errors import RecipeError
    from vlmgraft.recipe import load_recipe

    loaded = [(path, load_recipe(path)) for path in recipes]
    methods = [str(recipe.method.name) for _, recipe in loaded]
    names = [
        method if methods.count(method) == 1 else path.stem for (path, _), method in zip(loaded, methods, strict=True)
    ]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"sweep: two recipes would both be called {twice!r}; give their files different names")
    return dict(zip(names, (recipe for _, recipe in loaded), strict=True))
