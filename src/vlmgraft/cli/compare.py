"""`compare`: does one model answer better than another?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmgraft.cli.evaluate import Asks
from vlmgraft.cli.options import Resumable, command
from vlmgraft.cli.output import progress_bar


@command()
class Compare(Asks, Resumable):
    """Two models on the same items: differences with intervals, McNemar's test, averages."""

    first: Annotated[str, typer.Argument(help="folder that `evaluate` wrote, or a model")]
    second: Annotated[str, typer.Argument(help="the same, on the same items")]
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder to write; needed when models are asked")] = (
        None  # type: ignore[assignment]
    )

    def run(self) -> None:
        from vlmgraft.evaluation.evaluate import compare
        from vlmgraft.evaluation.paired import comparison_table

        with progress_bar(self.quiet or not self.data) as progress:
            paired = compare(
                self.first, self.second, data=self.data, out=self.out, resume=self.resume, progress=progress,
                **self.asking(),
            )  # fmt: skip
        self.show(paired, lambda: typer.echo(comparison_table(paired), nl=False))
