"""One model in memory that an analysis changes, asks and puts back, and the folder that keeps what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from vlmgraft.analysis.cell_log import CellLog
from vlmgraft.analysis.eval_data import EvalData, open_vlm
from vlmgraft.analysis.scores import Evaluator, summarise
from vlmgraft.analysis.swap import text_parameters
from vlmgraft.storage.progress import Progress

REMEDY = "lower batch_size or max_new_tokens"
"""Where memory runs out."""


@dataclass(frozen=True)
class Bench:
    """settings: JSON values that rows depend on. kl_from: KL of the model as it is now from the VLM, nats per token.
    resume: go on with the rows that `folder` holds."""

    model: Any
    processor: Any
    evaluator: Evaluator
    folder: Path
    settings: Mapping[str, Any]
    kl_from: Callable[[Any], float] | None = None
    resume: bool = False
    progress: Progress | None = None

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Role → parameter of the model's text part."""
        return text_parameters(self.model)

    def ask(self) -> dict[str, Any]:
        """Accuracies of the model as it is now, and its KL or None."""
        scores = asdict(summarise(self.evaluator(self.model), self.evaluator))
        return {**scores, "kl": None if self.kl_from is None else self.kl_from(self.model)}

    def measure(
        self,
        name: str,
        keys: Sequence[str],
        cells: Sequence[Mapping[str, Any]],
        figures: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> Iterator[dict[str, Any]]:
        """The rows of all cells, in `folder/name.jsonl` too; `figures(cell)` of those that are not there yet.

        Raises OutputError as `CellLog` does, before the first cell.
        """
        settings = {**self.settings, "exam": self.evaluator.label}
        log = CellLog(self.folder, name, keys, settings, resume=self.resume)
        return log.measure(cells, figures, self.progress)


def load_bench(model: str | Path, data: EvalData, folder: Path, **more: Any) -> Bench:
    """The loaded model on its bench, with the questions of `data` and those of its KL. more: the other fields."""
    loaded, processor = open_vlm(model)
    evaluator = data.evaluator(processor)
    return Bench(loaded, processor, evaluator, folder, kl_from=data.kl_from(loaded, processor), **more)
