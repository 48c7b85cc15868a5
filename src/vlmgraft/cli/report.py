"""`report`: one page from run folders; `lab report`: the lab's own, with every section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmgraft.cli.app import Out, app, lab_app


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="folders that other commands wrote")],
    out: Annotated[Path, typer.Option("--out", help="the page to write")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="of the page")] = "What was grafted, and what carries it",
) -> None:
    """One self-contained HTML page from run folders: trade-offs, layers, directions, gates, answers, recipe."""
    from vlmgraft.report.page import write_report as write

    path = write(folders, out, title)
    typer.echo(f"{path}: {path.stat().st_size:,} bytes")


@lab_app.command("report")
def lab_report(
    out: Out,
    seed: Annotated[int, typer.Option(help="of exams, calibration questions and training order")] = 0,
    trio: Annotated[Path | None, typer.Option(help="another trio, as `lab train` writes it")] = None,
    samples: Annotated[int, typer.Option(help="sums per exam; a quarter of it per kind of perception")] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what an interruption left")] = False,
) -> None:
    """Merge on the lab, analyse the result in every way, and write DIR/report.html; about five minutes."""
    from vlmgraft.lab.tour import tour

    tour(out, seed=seed, trio=trio, samples=samples, resume=resume, report=typer.echo)
