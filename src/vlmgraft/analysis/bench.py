"""One loaded model that an analysis modifies, evaluates and restores, and the folder that logs its measurements.

The folder is a resumable log: one JSON line per measured cell, and beside it a `.run.json` file with the settings that
all cells share, such as models and questions. A run with other settings does not resume it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from vlmgraft.analysis.eval_data import EvalData, open_vlm
from vlmgraft.analysis.in_memory import text_parameters
from vlmgraft.analysis.scores import Evaluator, summarise
from vlmgraft.checkpoint.digests import folder_digest
from vlmgraft.data.questions import questions_digest
from vlmgraft.errors import DamagedError, OutputError
from vlmgraft.storage.files import make_folder
from vlmgraft.storage.jsonl import append_row, read_json, read_rows, write_json, write_rows
from vlmgraft.storage.progress import LogProgress, Progress

REMEDY = "lower batch_size or max_new_tokens"
"""Advice when memory runs out."""
INPUTS = "inputs"
"""Key of a row under which a digest of its own inputs may stand, besides those that all rows share."""


@dataclass(frozen=True)
class Bench:
    """A loaded model with its questions and its log. settings: JSON values that the rows depend on. kl_from:
    measures the KL of a model from the VLM, nats per token. resume: continue from the rows that `folder` holds."""

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
        """Accuracies of the model in its current state, and its KL (None without prompts for it)."""
        scores = asdict(summarise(self.evaluator(self.model), self.evaluator))
        return {**scores, "kl": None if self.kl_from is None else self.kl_from(self.model)}

    def measure(
        self,
        name: str,
        keys: Sequence[str],
        cells: Sequence[Mapping[str, Any]],
        figures: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> Iterator[dict[str, Any]]:
        """Rows of all cells, also written to `folder/name.jsonl`; `figures(cell)` measures cells that have no row yet.

        Raises OutputError as `CellLog` does, before the first cell.
        """
        settings = {**self.settings, "exam": self.evaluator.label}
        log = CellLog(self.folder, name, keys, settings, resume=self.resume)
        return log.measure(cells, figures, self.progress)


def load_bench(
    model: str | Path,
    data: EvalData,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    models: Iterable[str | Path] = (),
    kl: bool = True,
    **more: Any,
) -> Bench:
    """Load a model and make its bench, with the questions and KL prompts of `data`.

    The settings get the dtype, and digests of all models that the rows depend on and of the KL prompts, so that a log
    is not resumed after any of them was changed under its name.

    Args:
        models: those besides `model`. kl: measure the KL too, if there are prompts. more: the other fields of `Bench`.
    """
    loaded, processor = open_vlm(model)
    evaluator = data.evaluator(processor)
    prompts = data.kl_prompts() if kl else None
    contents = {
        "weights": [folder_digest(each) for each in (model, *models)],
        "dtype": str(loaded.dtype),
        "KL prompts": prompts and [questions_digest(prompts[0]), prompts[1]],
    }
    kl_from = data.kl_from(loaded, processor, *prompts) if prompts else None
    return Bench(loaded, processor, evaluator, folder, {**settings, **contents}, kl_from=kl_from, **more)


class CellLog:
    """The rows of one analysis in `folder/name.jsonl`, identified by their `keys`.

    settings: JSON values that the rows depend on. resume: continue from the rows that exist.

    Raises:
        OutputError: rows exist and `resume` is False, or they were measured with other settings.
    """

    def __init__(
        self, folder: str | Path, name: str, keys: Sequence[str], settings: Mapping[str, Any], *, resume: bool = False
    ) -> None:
        self.folder, self.keys = Path(folder), tuple(keys)
        self.path = self.folder / f"{name}.jsonl"
        self.rows: list[dict[str, Any]] = list(read_rows(self.path)) if self.path.is_file() else []
        for row in self.rows:
            if not row.keys() >= set(keys):
                raise DamagedError(self.path, f"a row without {', '.join(keys)}: {row!r:.80}")
        if self.rows and not resume:
            raise OutputError(f"{self.path}: exists already; go on with --resume, or name another folder")
        self._check_settings(name, json.loads(json.dumps(settings)))
        if self.rows:
            write_rows(self.path, self.rows)  # drops a last line that an interruption cut short

    def _check_settings(self, name: str, settings: Mapping[str, Any]) -> None:
        file = self.folder / f"{name}.run.json"
        if self.rows and file.is_file():
            recorded = read_json(file)
            differing = sorted(key for key in {*recorded, *settings} if recorded.get(key) != settings.get(key))
            if differing:
                key = differing[0]
                raise OutputError(
                    f"{self.path}: was measured with {key} {recorded.get(key)!r}, not {settings.get(key)!r}; "
                    "name another folder"
                )
            return
        make_folder(self.folder)
        write_json(file, settings)

    def find(self, cell: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of a cell, None when it is not measured yet; raises OutputError if it had other `INPUTS`."""
        wanted = [cell[key] for key in self.keys]
        row = next((row for row in self.rows if [row[key] for key in self.keys] == wanted), None)
        if row is not None and row.get(INPUTS) != cell.get(INPUTS):
            raise OutputError(
                f"{self.path}: {' '.join(map(str, wanted))} was measured with other contents of the "
                "donors or questions; bring them back, or name another folder"
            )
        return row

    def add(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Append one measured row; return it as it will be read back from JSON."""
        plain = json.loads(json.dumps(row))
        append_row(self.path, plain, flush=True)
        self.rows.append(plain)
        return plain

    def measure(
        self,
        cells: Sequence[Mapping[str, Any]],
        measure: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        progress: Progress | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Rows of `cells` in their order; `measure(cell)` gives the figures of the cells that have no row yet."""
        progress = progress or LogProgress()
        for cell in cells:
            self.find(cell)
        for done, cell in enumerate(cells):
            progress(done, len(cells), " ".join(str(cell[key]) for key in self.keys))
            row = self.find(cell)
            yield row if row is not None else self.add({**cell, **measure(cell)})
        progress(len(cells), len(cells), self.path.stem)
