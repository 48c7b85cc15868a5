"""`knockout`: which layer carries what, of one model, or of a merged model beside its VLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlmgraft.analysis.blocks import MODES, PARTS, Mode, Part
from vlmgraft.analysis.knockout import Knockout
from vlmgraft.analysis.swap import StoredWeights
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.locks import at_work
from vlmgraft.recipe.source import read_mapping
from vlmgraft.studies.questions import Asked, layer_list, open_vlm

Progress = Callable[[int, int, str], None]


def knockout(
    model: str | Path,
    out: str | Path,
    asked: Asked | None = None,
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
    asked = asked or Asked()
    source = None if alone else vlm or _vlm_of(Path(model))
    checkpoint = open_checkpoint(source) if source else None
    loaded, processor = open_vlm(model)
    exam = asked.exam(processor)
    with ExitStack() as stack:
        stack.enter_context(at_work(out, "knocking out", "lower batch_size or max_new_tokens"))
        weights = stack.enter_context(StoredWeights(checkpoint)) if checkpoint else None
        prompts = exam.prompts(128) if "mean" in modes else []
        cells = Knockout(loaded, processor, exam, vlm=weights, prompts=prompts)
        return cells.run(
            out,
            {"model": str(model), "vlm": source},
            layers=layer_list(layers, cells.blocks.depth),
            parts=parts,
            modes=modes,
            resume=resume,
            progress=progress,
        )


def _vlm_of(model: Path) -> str | None:
    """The VLM of a merged folder, as its recipe names it."""
    recipe = model / "recipe.yaml"
    return read_mapping(recipe).get("vlm") if recipe.is_file() else None
