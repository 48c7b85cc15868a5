"""`choose`: which rule for this pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from vlmgraft.cli.knockout import ExaminesDivergence
from vlmgraft.cli.options import Overrides, RecipeArgument, command
from vlmgraft.cli.output import show_table


@command()
class Choose(ExaminesDivergence):
    """Race the rules that fit a recipe at equal KL: one table, one picture, the winner's recipe."""

    recipe: RecipeArgument
    overrides: Overrides = None
    budget: Annotated[float, typer.Option(help="KL from the VLM that every rule is brought to, nats per token")] = 0.01
    rule: Annotated[list[str] | None, typer.Option("--rule", help="race this one; repeatable [default: all]")] = None
    rounds: Annotated[int, typer.Option(help="of validation; 1 drops no rule before the test", min=1)] = 4

    def run(self) -> None:
        from vlmgraft.analysis.choice import choose
        from vlmgraft.report.charts import save_chart
        from vlmgraft.report.parts.tradeoff import tradeoff_chart

        with self.progress() as progress:
            choice = choose(
                self.recipe, self.out, self.questions(), budget=self.budget, rules=self.rule, rounds=self.rounds,
                overrides=self.overrides or [], resume=self.resume, progress=progress,
            )  # fmt: skip
        measured = [row for row in choice.rows if "reasoning" in row]
        title = f"at most {self.budget:g} nats per token from the VLM"
        save_chart(tradeoff_chart(measured), self.out / "choose.svg", title)
        columns = ("rule", "strength", "KL", "s", "validation", "reasoning", "perception", "behind the winner", "")
        table = [_line(row) for row in choice.rows]
        title = "% right [95 %]; behind the winner: points of reasoning, interval for all rules together"
        self.show(choice, lambda: show_table(title, columns, table))
        if choice.recipe is not None:
            work = self.out / str(choice.winner)
            more = f" --workdir {work}" if work.is_dir() else ""
            self.note(f"{choice.winner} wins: vlmgraft merge {choice.recipe}{more} --out merged")


def _line(row: Mapping[str, Any]) -> tuple[Any, ...]:
    keys = ("strength", "kl", "seconds", "validation", "reasoning", "perception", "behind", "fate")
    return row["method"], *(row.get(key) for key in keys)
