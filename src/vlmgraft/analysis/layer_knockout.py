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

from vlmgraft.analysis.bench import REMEDY, Bench
from vlmgraft.analysis.blocks import MODES, NEED_VLM, PARTS, Blocks, Means, Mode, Part
from vlmgraft.analysis.eval_data import EvalData, layer_list, open_vlm
from vlmgraft.analysis.scores import change
from vlmgraft.analysis.swap import StoredWeights, swapped
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import RecipeError
from vlmgraft.hf.batches import Question
from vlmgraft.recipe.source import located, read_mapping
from vlmgraft.storage.locks import at_work
from vlmgraft.storage.progress import Progress

Cell = Mapping[str, Any]
KEYS = ("model", "layer", "part", "mode")
INTACT: Cell = {"layer": None, "part": "both", "mode": "intact"}
VLM, MERGED, ALONE = "VLM", "merged", "model"


def knockout(
    model: str | Path,
    out: str | Path,
    data: EvalData | None = None,
    *,
    vlm: str | None = None,
    alone: bool = False,
    layers: str | Sequence[int] | None = None,
    parts: Sequence[Part] = PARTS,
    modes: Sequence[Mode] = MODES,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Knock out every layer × part by every mode; rows in `out`/knockout.jsonl. One model is loaded, once.

    Args:
        vlm: the VLM that `model` was merged from, which is then examined too, and whose weights `restore` and `only`
            put back; default: what the recipe.yaml of a merged folder says. alone: examine `model` by itself.
    Raises:
        RecipeError, DataError, CheckpointError, OutputError: before the first cell.
    """
    data, out = data or EvalData(), Path(out)
    source = None if alone else vlm or _vlm_of(Path(model))
    checkpoint = open_checkpoint(source) if source else None
    with ExitStack() as stack:
        stack.enter_context(at_work(out, "knocking out", REMEDY, [model, source or model], ["knockout.*"]))
        loaded, processor = open_vlm(model)
        evaluator = data.evaluator(processor)
        settings = {"model": str(model), "vlm": source}
        bench = Bench(loaded, processor, evaluator, out, settings, resume=resume, progress=progress)
        weights = stack.enter_context(StoredWeights(checkpoint)) if checkpoint else None
        prompts = data.prompts(evaluator) if "mean" in modes else []
        cells = Knockout(bench, vlm=weights, prompts=prompts)
        return cells.run(layers=layer_list(layers, cells.blocks.depth), parts=parts, modes=modes)


def _vlm_of(model: Path) -> str | None:
    """The VLM of a merged folder, as its recipe names it."""
    recipe = model / "recipe.yaml"
    named = read_mapping(recipe).get("vlm") if recipe.is_file() else None
    try:
        return named and located({"vlm": named}, model)["vlm"]
    except RecipeError:
        raise RecipeError(f"{recipe}: its VLM was {named}, which is not here; say where it is with --vlm") from None


def knockout_cells(
    layers: Iterable[int], parts: Sequence[Part] = PARTS, modes: Sequence[Mode] = MODES, *, both_models: bool
) -> list[dict[str, Any]]:
    """All cells, the intact models first. `restore` and `only` exist for a merged model beside its VLM."""
    models = [VLM, MERGED] if both_models else [ALONE]
    knocked_out = [
        {"model": model, "layer": layer, "part": part, "mode": mode}
        for model in models
        for mode in modes
        if model == MERGED or mode not in NEED_VLM
        for part in parts
        for layer in layers
    ]
    return [*({"model": model, **INTACT} for model in models), *knocked_out]


class Knockout:
    """The model on a bench and the VLM it came from.

    vlm: the VLM's weights by role; None when the model is examined alone (its rows then say "model").
    prompts: for mode `mean`, which averages each block's output over them.
    """

    def __init__(
        self, bench: Bench, *, vlm: Mapping[str, Tensor] | None = None, prompts: Sequence[Question] = ()
    ) -> None:
        self.bench, self.blocks = bench, Blocks(bench.model, vlm)
        self.vlm, self.prompts = vlm, prompts
        self._means: dict[str, Means] = {}

    def run(
        self, *, layers: Sequence[int] | None = None, parts: Sequence[Part] = PARTS, modes: Sequence[Mode] = MODES
    ) -> list[dict[str, Any]]:
        """Measure all cells into knockout.jsonl, and give the rows.

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
        rows: list[dict[str, Any]] = []
        for row in self.bench.measure("knockout", KEYS, cells, lambda cell: self._measure(cell, rows)):
            rows.append(row)
        return rows

    def _measure(self, cell: Cell, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        with ExitStack() as stack:
            if cell["model"] == VLM and self.vlm is not None:
                roles = [role for role in self.blocks.parameters if role in self.vlm]
                stack.enter_context(swapped(self.blocks.parameters, {role: self.vlm[role] for role in roles}))
            if cell["mode"] != "intact":
                means = self._block_means(cell["model"]) if cell["mode"] == "mean" else None
                stack.enter_context(self.blocks.knocked_out(cell["layer"], cell["part"], cell["mode"], means))
            scores = self.bench.ask()
        if cell["mode"] == "intact":
            return scores
        against = VLM if cell["mode"] == "only" else cell["model"]
        intact = next(row for row in rows if row["model"] == against and row["mode"] == "intact")
        changes = {
            f"{kind}_change": asdict(change(intact["right"], scores["right"], getattr(self.bench.evaluator, kind)))
            for kind in ("reasoning", "perception")
        }
        return {**scores, **changes, "against": against}

    def _block_means(self, model: str) -> Means:
        """The means of the model as it is now, taken once per model; the caller has swapped its weights in."""
        if model not in self._means:
            self._means[model] = self.blocks.means(self.bench.processor, self.prompts)
        return self._means[model]
