"""`report`: one page from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmgraft.cli.options import Command, command


@command()
class Report(Command):
    """One self-contained HTML page from run folders: trade-offs, layers, directions, gates, answers, recipe."""

    folders: Annotated[list[Path], typer.Argument(help="folders that other commands wrote")]
    out: Annotated[Path, typer.Option("--out", "-o", help="the page to write; replaced if it exists")] = Path(
        "report.html"
    )
    title: Annotated[str, typer.Option(help="of the page")] = "What was grafted, and what carries it"

    figures: Annotated[
        Path | None, typer.Option(help="folder for the trade-offs as SVG and PDF, drawn by matplotlib")
    ] = None

    def run(self) -> None:
        from vlmgraft.report.page import write_figures, write_report

        path = write_report(self.folders, self.out, self.title)
        drawn = [str(figure) for figure in write_figures(self.folders, self.figures)] if self.figures else []
        size = path.stat().st_size
        text = "\n".join([f"{path}: {size:,} bytes", *drawn])
        self.show({"out": str(path), "bytes": size, "figures": drawn}, text)
