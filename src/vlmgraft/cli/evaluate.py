"""`evaluate` and `compare`: what a model answers, and whether another answers better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmgraft.cli.app import AsJson, Quiet, app, progress_bar

Data = Annotated[
    list[str] | None,
    typer.Option("--data", help="file, data set's id, PRESET, PRESET:FILE, lab, or lmms:TASK,TASK; may be repeated"),
]
Resume = Annotated[bool, typer.Option("--resume", help="go on with what an interruption left")]
BatchSize = Annotated[int, typer.Option(help="questions at once; halved when memory runs out")]
MaxNewTokens = Annotated[int | None, typer.Option(help="limit of an answer [default: what the data needs]")]
Suffix = Annotated[str | None, typer.Option(help="instruction below every question [default: the preset's]")]
Temperature = Annotated[float, typer.Option(help="0 is greedy")]
TopP = Annotated[float, typer.Option("--top-p", help="nucleus, when sampling")]
Seed = Annotated[int, typer.Option(help="of sampling and of the bootstrap")]
Engine = Annotated[str, typer.Option(help="transformers or vllm")]
Device = Annotated[str | None, typer.Option(help="such as cuda:1 [default: the first GPU, or the CPU]")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto is the checkpoint's")]
Limit = Annotated[int | None, typer.Option(help="the first so many rows of each source")]
Column = Annotated[
    list[str] | None, typer.Option("--column", help="field=column: question, images, answers, choices, …")
]
Split = Annotated[str | None, typer.Option(help="of a data set")]
Config = Annotated[str | None, typer.Option(help="of a data set")]
Circular = Annotated[bool, typer.Option("--circular", help="every rotation of lettered choices, right only together")]


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="folder or hub id")],
    out: Annotated[Path, typer.Option("--out", help="folder to write; must not exist")],
    data: Data = None,
    resume: Resume = False,
    batch_size: BatchSize = 32,
    max_new_tokens: MaxNewTokens = None,
    suffix: Suffix = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    engine: Engine = "transformers",
    device: Device = None,
    dtype: Dtype = "auto",
    limit: Limit = None,
    column: Column = None,
    split: Split = None,
    config: Config = None,
    circular: Circular = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Ask a model questions and score its answers, item by item."""
    from vlmgraft import measure
    from vlmgraft.errors import DataError
    from vlmgraft.evaluation.tables import summary_table

    if not data:
        raise DataError("evaluate: --data is missing; give a question file, a preset such as mathvista, or lab")
    options: dict[str, Any] = {
        "batch_size": batch_size, "max_new_tokens": max_new_tokens, "suffix": suffix, "temperature": temperature,
        "top_p": top_p, "seed": seed, "engine": engine, "device": device, "dtype": dtype, "limit": limit,
        "columns": _map(column), "split": split, "config": config, "circular": circular,
    }  # fmt: skip
    with progress_bar(quiet) as progress:
        summary = measure.evaluate(model, data, out, resume=resume, progress=progress, **options)
    typer.echo(json.dumps(summary.as_json()) if as_json else summary_table(summary), nl=as_json)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="folder that `evaluate` wrote, or a model")],
    second: Annotated[str, typer.Argument(help="the same, on the same items")],
    data: Data = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder to write; needed when models are asked")] = None,
    resume: Resume = False,
    batch_size: BatchSize = 32,
    max_new_tokens: MaxNewTokens = None,
    suffix: Suffix = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    limit: Limit = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Two models on the same items: differences with intervals, McNemar's test, averages."""
    from vlmgraft import measure
    from vlmgraft.evaluation.tables import comparison_table

    options: dict[str, Any] = {
        "batch_size": batch_size, "max_new_tokens": max_new_tokens, "suffix": suffix, "seed": seed, "device": device,
        "dtype": dtype, "limit": limit,
    }  # fmt: skip
    with progress_bar(quiet or not data) as progress:
        found = measure.compare(first, second, data=data, out=out, resume=resume, progress=progress, **options)
    typer.echo(json.dumps(found.as_json()) if as_json else comparison_table(found), nl=as_json)


def _map(pairs: list[str] | None) -> dict[str, str] | None:
    from vlmgraft.errors import DataError

    for pair in pairs or []:
        if not all(pair.partition("=")):
            raise DataError(f"--column {pair!r}: write field=column, such as --column question=query")
    return {pair.partition("=")[0]: pair.partition("=")[2] for pair in pairs or []} or None
