"""`export`: a merged folder to the hub or in FP8, or gates as a LoRA adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlmgraft.cli.options import Computes, Writes, command

if TYPE_CHECKING:
    from vlmgraft.export.lora import LoraReport

CARD = 24
"""Lines of the model card that are shown before it is published."""


@command()
class Export(Computes, Writes):
    """Push a merged folder to the hub, write it in FP8 as its VLM is, or write gates, or a front of them, as LoRA."""

    source: Annotated[Path, typer.Argument(help="merged folder (hub, fp8), gates or front folder (lora)")]
    to: Annotated[Literal["lora", "hub", "fp8"], typer.Option("--to", help="lora, hub or fp8")]
    out: Annotated[Path | None, typer.Option("--out", "-o", help="lora, fp8: folder to write")] = None  # type: ignore[assignment]
    factors: Annotated[Path | None, typer.Option(help="lora: factors of the gates")] = None
    vlm: Annotated[str | None, typer.Option(help="lora: the VLM the adapter applies to; fp8: the one in FP8")] = None
    rank: Annotated[int, typer.Option(help="lora: of the adapter, at most")] = 64
    name: Annotated[str | None, typer.Option(help="hub: organisation/name")] = None
    public: Annotated[bool, typer.Option("--public", help="hub: a repository that all can see")] = False
    yes: Annotated[bool, typer.Option("--yes", "-y", help="hub: publish what is listed without asking")] = False

    def run(self) -> None:
        if self.to == "hub":
            self._push()
        elif self.to == "fp8":
            self._write_fp8()
        else:
            self._write_adapter()

    def _push(self) -> None:
        from vlmgraft.errors import RecipeError
        from vlmgraft.export.hub import published, push_to_hub

        if self.name is None:
            raise RecipeError("export --to hub: give --name organisation/name")
        listing = published(self.source)
        total = sum(file.nbytes for file in listing)
        who = "everyone" if self.public else "its owner"
        card = (self.source / "README.md").read_text(encoding="utf-8")
        lines = [f"{self.name}, visible to {who}: {len(listing)} files, {total:,} bytes"]
        lines += [f"  {file.nbytes:>15,}  {file.name}" for file in listing]
        shown = "\n".join([*lines, "its card begins:", *card.splitlines()[:CARD], "…"])
        self.note(shown)
        if not self.yes:
            self._ask(shown)
        address = push_to_hub(self.source, self.name, private=not self.public, token=self.token)
        self.show({"address": address}, address)

    def _ask(self, shown: str) -> None:
        """End the command unless the user confirms what was shown."""
        from vlmgraft.errors import RecipeError

        if not sys.stdin.isatty():
            raise RecipeError("export --to hub: there is no terminal to ask; read what is listed, then give --yes")
        if self.quiet:
            typer.echo(shown, err=True)
        if not typer.confirm("publish?", err=True):
            raise typer.Exit(1)

    def _write_fp8(self) -> None:
        from vlmgraft.errors import RecipeError
        from vlmgraft.export.fp8 import write_fp8
        from vlmgraft.storage.locks import at_work

        if self.out is None or self.vlm is None:
            raise RecipeError("export --to fp8: give --out and --vlm, the VLM in FP8 that was merged")
        working = at_work(self.out, "exporting", "close other programs", [self.source, self.vlm])
        with working, self.progress() as progress:
            error = write_fp8(self.source, self.vlm, self.out, progress=progress)
        line = f"{self.out}: in FP8, {100 * error:.2f} % of the norm of the quantised matrices is rounding"
        self.show({"error": error}, line)

    def _write_adapter(self) -> None:
        from vlmgraft.errors import RecipeError
        from vlmgraft.pipeline import export_front, export_lora

        if self.out is None or self.factors is None or self.vlm is None:
            raise RecipeError("export --to lora: give --out, --factors (of `decompose` or the workdir) and --vlm")
        said: dict[str, Any] = {"factors": self.factors, "vlm": self.vlm, "rank": self.rank}
        if (self.source / "front.jsonl").is_file():
            reports = export_front(self.source, self.out, **said)
            lines = [f"{self.out / name}: {_left_out(report)}" for name, report in reports.items()]
            self.show(reports, "\n".join(lines))
            return
        report = export_lora(self.source, self.out, **said)
        self.show(report, f"{self.out}: {_left_out(report)}")


def _left_out(report: LoraReport) -> str:
    return f"rank {report.rank}, {100 * report.error:.2f} % of the update's norm is left out"
