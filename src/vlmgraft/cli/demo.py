"""`demo`: the lab, end to end and offline."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from vlmgraft.cli.options import Computes, Writes, command
from vlmgraft.cli.output import LineProgress


@command()
class Demo(Computes, Writes):
    """Graft reasoning into the lab's VLM, end to end and offline, and compare the methods."""

    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write; must not exist")] = Path("demo")
    seed: Annotated[int, typer.Option(help="of exams, calibration questions and training order")] = 0
    trio: Annotated[Path | None, typer.Option(help="another trio: a folder with base, vlm and donor")] = None
    quick: Annotated[bool, typer.Option("--quick", help="fewer settings and questions: a first look")] = False

    def run(self) -> None:
        from vlmgraft.lab.demo import FULL, QUICK, demo
        from vlmgraft.storage.jsonl import read_rows

        report = self.note if self.as_json else typer.echo
        settings = QUICK if self.quick else FULL
        with nullcontext() if self.quiet else LineProgress() as progress:  # also on a terminal: it reports line by line
            demo(self.out, seed=self.seed, trio=self.trio, settings=settings, report=report, progress=progress)
        if self.as_json:
            self.show({"out": str(self.out), "rows": list(read_rows(self.out / "results.jsonl"))}, "")
