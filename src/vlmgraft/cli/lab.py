"""`demo` and `lab`: the embedded trio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmgraft.cli.app import Out, app, lab_app


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="folder to write; must not exist")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="of exams, calibration questions and training order")] = 0,
    trio: Annotated[Path | None, typer.Option(help="another trio, as `lab train` writes it")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer settings and questions: a first look")] = False,
) -> None:
    """Graft reasoning into the lab's VLM, end to end and offline, and compare the methods."""
    from vlmgraft.lab.demo import demo as run

    run(out, seed=seed, trio=trio, quick=quick, report=typer.echo)


@lab_app.command("path")
def lab_path() -> None:
    """Print the folder of the embedded trio (base, vlm, donor)."""
    from vlmgraft.lab import trio_path

    typer.echo(trio_path())


@lab_app.command("train")
def lab_train(
    out: Out,
    seed: Annotated[int, typer.Option(help="of everything: data, weights, order")] = 0,
    printed: Annotated[
        bool, typer.Option("--printed", help="printed digits in place of handwriting, a control")
    ] = False,
) -> None:
    """Train a trio from scratch; about 15 minutes on two cores."""
    from vlmgraft.lab.train import train_trio

    train_trio(seed, out, report=typer.echo, glyphs="printed" if printed else "handwriting")
    typer.echo(f"{out}: base, vlm, donor")
