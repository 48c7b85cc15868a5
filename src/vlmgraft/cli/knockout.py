"""`knockout`: which layer carries what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from vlmgraft.cli.options import LoadsModels, Resumable, command
from vlmgraft.cli.output import show_table


class Examines(LoadsModels, Resumable):
    """The data that an analysis asks: the options are fields of `analysis.EvalData` under their names."""

    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="lab, or what `evaluate` reads: question file, data set, benchmark; repeatable"),
    ] = None
    reasoning: Annotated[
        list[str] | None, typer.Option("--reasoning", help="a category or task that counts as reasoning; repeatable")
    ] = None
    samples: Annotated[int | None, typer.Option(help="ask about so many questions; of the lab half are sums")] = None
    max_new_tokens: Annotated[int | None, typer.Option(help="length of an answer [default: the data's]")] = None
    batch_size: Annotated[int | None, typer.Option(help="questions at a time [default: the data's, or 16]", min=1)] = (
        None
    )
    split: Annotated[str | None, typer.Option(help="of data that has splits [default: of the lab validation]")] = None
    seed: Annotated[int, typer.Option(help="of the lab's questions")] = 0

    def questions(self) -> Any:
        """The options as `EvalData`, which the analyses take."""
        from vlmgraft.analysis import EvalData

        options = self.options_of(EvalData)
        lab = f"lab:{self.seed}" if self.seed else "lab"
        options["data"] = tuple(lab if data == "lab" else data for data in self.data or ["lab"])
        options["reasoning"] = tuple(self.reasoning) if self.reasoning else None
        return EvalData(**options)


class ExaminesDivergence(Examines):
    """An analysis that can measure the KL from the VLM beside its scores."""

    drift: Annotated[str | None, typer.Option(help="question file on which the KL from the VLM is measured")] = None


@command(name="knockout")
class KnockoutCommand(Examines):
    """Which layer carries what: knock out every layer's attention, mlp and both."""

    model: Annotated[str, typer.Argument(help="merged folder, or any supported VLM")]
    vlm: Annotated[str | None, typer.Option(help="the VLM it was merged from; default: its recipe.yaml's")] = None
    alone: Annotated[bool, typer.Option("--alone", help="this model by itself, no VLM beside it")] = False
    layers: Annotated[str, typer.Option(help="all, a number, or a range such as 0-5")] = "all"
    part: Annotated[list[str] | None, typer.Option(help="attention, mlp or both; repeatable")] = None
    mode: Annotated[list[str] | None, typer.Option(help="constant, zero, mean, restore or only; repeatable")] = None

    def run(self) -> None:
        from vlmgraft.analysis.layer_knockout import MODES, PARTS, knockout

        chosen: dict[str, Any] = {"parts": self.part or PARTS, "modes": self.mode or MODES}
        with self.progress() as progress:
            rows = knockout(
                self.model, self.out, self.questions(), vlm=self.vlm, alone=self.alone, layers=self.layers,
                resume=self.resume, progress=progress, **chosen,
            )  # fmt: skip
        self.show({"rows": list(rows)}, lambda: _print_rows(rows))


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per layer and part: the changes of reasoning and perception under every mode, per model."""
    intact = [row for row in rows if row["mode"] == "intact"]
    show_table(
        "intact, % right [95 %]",
        ("model", "reasoning", "perception"),
        [(row["model"], row["reasoning"], row["perception"]) for row in intact],
    )
    knocked_out = [row for row in rows if row["mode"] != "intact"]
    for model in dict.fromkeys(row["model"] for row in knocked_out):
        of_model = [row for row in knocked_out if row["model"] == model]
        modes = list(dict.fromkeys(row["mode"] for row in of_model))
        blocks = list(dict.fromkeys((row["part"], row["layer"]) for row in of_model))
        by_cell = {(row["part"], row["layer"], row["mode"]): row for row in of_model}
        body = []
        for part, layer in blocks:
            body.append((f"{part}, layer {layer}", *(_changes(by_cell.get((part, layer, mode))) for mode in modes)))
        title = f"{model}: change of reasoning / perception, points (`only`: against the VLM)"
        show_table(title, ("block", *modes), body)


def _changes(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return " / ".join(f"{100 * row[f'{kind}_change']['mean']:+.1f}" for kind in ("reasoning", "perception"))
