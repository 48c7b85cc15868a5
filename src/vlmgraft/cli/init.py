"""`init`: a commented recipe for one's own pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmgraft.cli.options import Fetches, command


@command()
class Init(Fetches):
    """Write a commented recipe; the donor's base is taken from the donor's model card where that names one."""

    out: Annotated[Path, typer.Option("--out", "-o", help="the recipe to write")] = Path("recipe.yaml")
    vlm: Annotated[str | None, typer.Option(help="the vision-language model: folder or hub id")] = None
    donor: Annotated[str | None, typer.Option(help="the text model that reasons: folder or hub id")] = None
    donor_base: Annotated[str | None, typer.Option(help="the model the donor was tuned from")] = None
    data: Annotated[
        str | None, typer.Option("--data", help="questions with images, no answers needed: writes a recipe of FRISM")
    ] = None
    force: Annotated[bool, typer.Option("--force", help="replace a recipe that exists")] = False

    def run(self) -> None:
        from vlmgraft.data.questions import load_questions
        from vlmgraft.errors import OutputError
        from vlmgraft.export.licence import stated_base
        from vlmgraft.recipe.template import recipe_template, shares
        from vlmgraft.storage.jsonl import write_text
        from vlmgraft.storage.outputs import refuse_file

        if self.out.exists() and not self.force:
            raise OutputError(f"{self.out}: exists; choose another name with --out, or replace it with --force")
        refuse_file(self.out, lambda head: b"vlm:" in head)
        base = self.donor_base or (stated_base(self.donor) if self.donor else None)
        count = len(load_questions(self.data, need_images=True, check_images=False)) if self.data else 640
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.out, recipe_template(self.vlm, self.donor, base, self.data, count))
        if self.data:
            samples, held_out = shares(count)
            self.note(f"{self.data}: {count} questions; {samples} are learned from, {held_out} others measured on")
        ask = f"vlmgraft inspect --vlm {self.vlm or 'VLM'} --donor {self.donor or 'DONOR'} --distances --donor-base ONE"
        find = (
            "write donor_base, the model that the donor was tuned from: the donor's card or paper says it, and of "
            f"several that may be it `{ask} --donor-base OTHER` names the nearest; "
        )
        line = f"{self.out}: {'' if base else find}next `vlmgraft inspect {self.out}`, then `vlmgraft merge {self.out} "
        self.show({"out": str(self.out), "donor_base": base}, f"{line}--out merged --dry-run`")
