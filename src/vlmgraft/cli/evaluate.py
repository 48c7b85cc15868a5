"""`evaluate`: what a model answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from vlmgraft.cli.options import LoadsModels, Resumable, command


class Asks(LoadsModels):
    """How a model is asked: the options are fields of `evaluation.evaluate.Asking` under their names."""

    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", help="file, data set's id, PRESET, PRESET:FILE, lab, or lmms:TASK,TASK; may be repeated"
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(help="questions at once; halved when memory runs out", min=1)] = 32
    max_new_tokens: Annotated[int | None, typer.Option(help="limit of an answer [default: what the data needs]")] = None
    suffix: Annotated[str | None, typer.Option(help="instruction below every question [default: the preset's]")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto is the checkpoint's")
    ] = "auto"
    seed: Annotated[int, typer.Option(help="of sampling and of the bootstrap")] = 0
    limit: Annotated[int | None, typer.Option(help="the first so many rows of each source")] = None

    def asking(self) -> dict[str, Any]:
        """The options that are fields of `Asking`, by name."""
        from vlmgraft.evaluation.evaluate import Asking

        return self.options_of(Asking)


@command()
class Evaluate(Asks, Resumable):
    """Ask a model questions and score its answers, item by item."""

    model: Annotated[str, typer.Argument(help="folder or hub id")]
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0
    top_p: Annotated[float, typer.Option("--top-p", help="nucleus, when sampling")] = 1.0
    engine: Annotated[Literal["transformers", "vllm"], typer.Option(help="what generates the answers")] = "transformers"
    column: Annotated[
        list[str] | None, typer.Option("--column", help="field=column: question, images, answers, choices, …")
    ] = None
    split: Annotated[str | None, typer.Option(help="of a data set")] = None
    config: Annotated[str | None, typer.Option(help="of a data set")] = None
    circular: Annotated[
        bool, typer.Option("--circular", help="every rotation of lettered choices, right only together")
    ] = False
    steer: Annotated[str | None, typer.Option(help="file that `steer` wrote: a direction added to hidden states")] = (
        None
    )
    steer_strength: Annotated[float | None, typer.Option(help="in place of the file's own")] = None
    judge: Annotated[str | None, typer.Option(help="address of an OpenAI-compatible endpoint that judges too")] = None
    judge_model: Annotated[str, typer.Option("--judge-model", help="its model's name")] = ""

    def run(self) -> None:
        from vlmgraft.errors import DataError
        from vlmgraft.evaluation.evaluate import evaluate
        from vlmgraft.evaluation.summary import summary_table

        if not self.data:
            raise DataError("evaluate: --data is missing; give a question file, a preset such as mathvista, or lab")
        options = {**self.asking(), "columns": _column_map(self.column)}
        with self.progress() as progress:
            summary = evaluate(self.model, self.data, self.out, resume=self.resume, progress=progress, **options)
        self.show(summary, lambda: typer.echo(summary_table(summary), nl=False))


def _column_map(pairs: list[str] | None) -> dict[str, str] | None:
    from vlmgraft.errors import DataError

    for pair in pairs or []:
        if not all(pair.partition("=")):
            raise DataError(f"--column {pair!r}: write field=column, such as --column question=query")
    return {pair.partition("=")[0]: pair.partition("=")[2] for pair in pairs or []} or None
