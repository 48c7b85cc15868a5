"""Knock-out: which layer carries what, before and after merging (Bring Reason to Vision, arXiv 2505.05464).

Every cell is one layer × part × mode on one model; see `blocks.py` for the modes. All cells use one loaded model: the
merged one, and the VLM's weights are swapped in where the VLM itself is examined.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmgraft.analysis.blocks import MODES, NEED_VLM, PARTS, Blocks, Means, Mode, Part
from vlmgraft.analysis.log import CellLog, Progress
from vlmgraft.analysis.scores import Exam, change, summarise
from vlmgraft.analysis.swap import swapped
from vlmgraft.errors import RecipeError
from vlmgraft.hf.data import Question

Cell = Mapping[str, Any]
KEYS = ("model", "layer", "part", "mode")
INTACT: Cell = {"layer": None, "part": "both", "mode": "intact"}
VLM, MERGED, ALONE = "VLM", "merged", "model"


def knockout_cells(
    layers: Iterable[int], parts: Sequence[Part] = PARTS, modes: Sequence[Mode] = MODES, *, both_models: bool
) -> list[dict[str, Any]]:
    """All cells, the intact models first. `restore` and `only` exist for a merged model beside its VLM."""
    models = [VLM, MERGED] if both_models else [ALONE]
    found = [{"model": model, **INTACT} for model in models]
    for model in models:
        own = [mode for mode in modes if model == MERGED or mode not in NEED_VLM]
        found += [
            {"model": model, "layer": layer, "part": part, "mode": mode}
            for mode in own
            for part in parts
            for layer in layers
        ]
    return found


class Knockout:
    """One model in memory, the exam it takes and the VLM it came from.

    vlm: the VLM's weights by role; None when the model is examined alone (its rows then say "model").
    prompts: for mode `mean`, which averages each block's output over them.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        exam: Exam,
        *,
        vlm: Mapping[str, Tensor] | None = None,
        prompts: Sequence[Question] = (),
    ) -> None:
        self.blocks = Blocks(model, vlm)
        self.processor, self.exam, self.vlm, self.prompts = processor, exam, vlm, prompts
        self._means: dict[str, Means] = {}

    def run(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        *,
        layers: Sequence[int] | None = None,
        parts: Sequence[Part] = PARTS,
        modes: Sequence[Mode] = MODES,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Measure all cells into `folder/knockout.jsonl`, and give the rows.

        A row has the accuracies of its cell and their change against the intact model: for `only`, which is the VLM
        with one merged block, against the VLM.

        Raises:
            RecipeError: a mode needs what is not given. OutputError: as `CellLog`.
        """
        if "mean" in modes and not self.prompts:
            raise RecipeError("mode mean needs prompts to average over; give some, or leave the mode out")
        chosen = range(self.blocks.depth) if layers is None else layers
        for layer in chosen:
            if not 0 <= layer < self.blocks.depth:
                raise RecipeError(f"layer {layer}: the model has layers 0 to {self.blocks.depth - 1}")
        cells = knockout_cells(chosen, parts, modes, both_models=self.vlm is not None)
        log = CellLog(folder, "knockout", KEYS, {**settings, "exam": self.exam.label}, resume=resume)
        rows: list[dict[str, Any]] = []
        for row in log.measure(cells, lambda cell: self._measure(cell, rows), progress):
            rows.append(row)
        return rows

    def _measure(self, cell: Cell, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        with ExitStack() as stack:
            if cell["model"] == VLM and self.vlm is not None:
                stack.enter_context(swapped(self.blocks.parameters, self._vlm_weights()))
            if cell["mode"] != "intact":
                means = self._block_means(cell["model"]) if cell["mode"] == "mean" else None
                stack.enter_context(self.blocks.knocked_out(cell["layer"], cell["part"], cell["mode"], means))
            scores = asdict(summarise(self.exam(self.blocks.model), self.exam))
        if cell["mode"] == "intact":
            return scores
        against = VLM if cell["mode"] == "only" else cell["model"]
        intact = next(row for row in rows if row["model"] == against and row["mode"] == "intact")
        changes = {
            f"{kind}_change": asdict(change(intact["right"], scores["right"], getattr(self.exam, kind)))
            for kind in ("reasoning", "perception")
        }
        return {**scores, **changes, "against": against}

    def _vlm_weights(self) -> dict[str, Tensor]:
        vlm = self.vlm or {}
        return {role: vlm[role] for role in self.blocks.parameters if role in vlm}

    def _block_means(self, model: str) -> Means:
        """The means of the model as it is now, taken once per model; the caller has swapped its weights in."""
        if model not in self._means:
            self._means[model] = self.blocks.means(self.processor, self.prompts)
        return self._means[model]
