"""`verify`: is a folder still what was written?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from vlmgraft.cli.app import AsJson, Quiet, app, progress_bar


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="folder that merge, tune, decompose, gates, evaluate or export wrote")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a folder against its receipt; exit code 1 if any differs."""
    from vlmgraft.checkpoint.verify import verify as run

    with progress_bar(quiet) as progress:
        found = run(folder, progress=progress)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
    else:
        for fault in found.faults:
            typer.echo(f"{folder}/{fault}")
        for name in found.unlisted:
            typer.echo(f"note: {name} is not in the receipt and was not checked")
        counts = f"{found.tensors} tensors in {found.files} files, {found.nbytes:,} bytes"
        typer.echo(f"{folder}: {counts}: {f'{len(found.faults)} faults' if found.faults else 'as written'}")
    if found.faults:
        raise typer.Exit(1)
