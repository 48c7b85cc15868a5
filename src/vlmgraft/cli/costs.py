"""`costs`: time, memory and disk of every stage, before anything runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from vlmgraft.cli.options import Fetches, command
from vlmgraft.cli.output import duration, show_table, size

SIZES = ("3b", "7b", "32b", "72b", "30b-a3b")


@command()
class Costs(Fetches):
    """Operations, disk, memory and time of every stage on data-centre GPUs; formulas are in docs/scale.md."""

    model: Annotated[
        str | None, typer.Argument(help="recipe in YAML, or a VLM's folder or hub id; only its config is read")
    ] = None
    size: Annotated[
        Literal["3b", "7b", "32b", "72b", "30b-a3b"] | None, typer.Option(help="in place of a model: a Qwen-VL's size")
    ] = None
    rank: Annotated[str, typer.Option(help="full, or directions per matrix")] = "128"
    gpus: Annotated[int, typer.Option(help="how many share the work", min=1)] = 1
    gpu: Annotated[Literal["A100", "H100"], typer.Option(help="their kind, 80 GB each")] = "H100"

    def run(self) -> None:
        from vlmgraft.costs.cost import Work, stages
        from vlmgraft.costs.device import A100, H100
        from vlmgraft.errors import RecipeError

        if self.rank != "full" and not self.rank.isdigit():
            raise RecipeError(f"--rank {self.rank!r}: write full, or a number of directions")
        model = self._model()
        work = Work(rank="full" if self.rank == "full" else int(self.rank), gpus=self.gpus)
        rows = stages(model, work, A100 if self.gpu == "A100" else H100)
        table = []
        for row in rows:
            sizes = map(size, (row.read, row.written, row.memory))
            table.append((row.name, f"{row.operations:.3g}", *sizes, duration(row.seconds)))
        billions = f"{model.parameters / 1e9:.1f} billion parameters"
        title = f"{model.name}, {billions}, rank {self.rank}, {self.gpus} {self.gpu}"
        columns = ("stage", "operations", "reads", "writes", "memory", "time")
        result = {"model": model.name, "parameters": model.parameters, "stages": rows}
        self.show(result, lambda: show_table(title, columns, table))

    def _model(self) -> Any:
        from vlmgraft.costs.models import MODELS, Model
        from vlmgraft.errors import RecipeError
        from vlmgraft.recipe.model import load_recipe

        if (self.model is None) == (self.size is None):
            raise RecipeError("costs: give a recipe or a model, or --size with one of " + ", ".join(SIZES))
        if self.size is not None:
            return MODELS[SIZES.index(self.size)]
        from vlmgraft.hf.models import load_config

        source = str(self.model)
        name = load_recipe(source, need_method=False).vlm if source.endswith((".yaml", ".yml")) else source
        return Model.of(name, load_config(name))
