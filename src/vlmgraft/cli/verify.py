"""`verify`: is a folder still what its receipt says?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmgraft.cli.options import Command, command


@command()
class Verify(Command):
    """Check every byte of a folder against its receipt; exit code 1 if anything differs."""

    folder: Annotated[Path, typer.Argument(help="folder that merge, tune, decompose, gates, evaluate or export wrote")]
    sources: Annotated[
        list[str] | None,
        typer.Option("--source", help="check a checkpoint that it was made from, too: donor=FOLDER, repeated"),
    ] = None

    threads: Annotated[int, typer.Option(help="that read at once", min=1)] = 2

    def run(self) -> None:
        from vlmgraft.checkpoint.verify import verify
        from vlmgraft.errors import CheckpointError

        sources = dict(text.partition("=")[::2] for text in self.sources or ())
        if "" in sources.values():
            raise CheckpointError("--source: write a name of the receipt and a checkpoint, such as donor=FOLDER")
        with self.progress() as progress:
            result = verify(self.folder, sources=sources, threads=self.threads, progress=progress)
        self.show(result, lambda: self._print(result))
        if not result.unchanged:
            raise typer.Exit(1)

    def _print(self, result: Any) -> None:
        from vlmgraft.errors import printable

        for fault in result.faults:
            typer.echo(printable(str(self.folder / str(fault))))
        for name in result.unlisted:
            typer.echo(printable(f"{self.folder}/{name}: is not in the receipt"))
        counts = f"{result.tensors} tensors in {result.files} files, {result.nbytes:,} bytes"
        differences = len(result.faults) + len(result.unlisted)
        outcome = "unchanged since its receipt" if result.unchanged else f"{differences} differences"
        typer.echo(printable(f"{self.folder}: {counts}: {outcome}"))
