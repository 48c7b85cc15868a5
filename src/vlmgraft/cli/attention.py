"""`attention`: where a VLM looks, layer by layer."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vlmgraft.cli.app import AsJson, Quiet, app, progress_bar


@app.command()
def attention(
    model: Annotated[str, typer.Argument(help="VLM: folder or hub id")],
    data: Annotated[str, typer.Option("--data", help="question file with images, or lab")] = "lab",
    samples: Annotated[int, typer.Option("--samples", help="at most so many questions")] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", help="questions at a time")] = 4,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The share of attention that text gives to visual tokens, per layer: FRANK's `visual_attention`."""
    from vlmgraft.studies import attention as run

    with progress_bar(quiet) as progress:
        shares = run(model, data, samples=samples, batch_size=batch_size, progress=progress)
    if as_json:
        typer.echo(json.dumps({"visual_attention": shares}))
        return
    typer.echo("method:")
    typer.echo("  name: frank")
    typer.echo(f"  visual_attention: [{', '.join(f'{share:.4g}' for share in shares)}]")
