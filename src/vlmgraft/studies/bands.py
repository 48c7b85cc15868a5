"""`ranks`: which singular directions of a recipe's task vector carry what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmgraft import pipeline
from vlmgraft.analysis.merged import Rebuilder
from vlmgraft.analysis.ranks import DEFAULT_SCALES, By, measure_ranks, rank_cells
from vlmgraft.folders import make_folder
from vlmgraft.locks import at_work
from vlmgraft.spectral.decompose import decompose
from vlmgraft.studies.questions import Asked, open_vlm

Progress = Callable[[int, int, str], None]


def ranks(
    recipe: pipeline.RecipeSource,
    out: str | Path,
    asked: Asked | None = None,
    *,
    overrides: Sequence[str] = (),
    bands: int = 4,
    scales: Sequence[float] = DEFAULT_SCALES,
    by: By = "rank",
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Inject one band of directions at a time over λ; rows in `out`/ranks.jsonl. The recipe's method is not used.

    The factors are kept in `out`/factors. Raises as `pipeline.decompose`, DataError and OutputError.
    """
    asked, out = asked or Asked(), Path(out)
    rank_cells(bands, scales, by)
    loaded = pipeline.read_recipe(recipe, overrides, need_method=False)
    alignment = pipeline.pair(loaded)
    with at_work(out, "measuring bands", "lower batch_size or max_new_tokens"):
        make_folder(out)
        store = decompose(alignment, out / "factors", resume=True, progress=progress)
        model, processor = open_vlm(alignment.vlm.path)
        exam = asked.exam(processor)
        settings = {"vlm": loaded.vlm, "donor": loaded.donor, "donor_base": loaded.donor_base, "factors": store.digest}
        drift = asked.drift_from(model, processor, exam)
        with Rebuilder(alignment, dict(store)) as rebuilder:
            return measure_ranks(
                model,
                exam,
                rebuilder,
                out,
                settings,
                bands=bands,
                scales=scales,
                by=by,
                drift=drift,
                resume=resume,
                progress=progress,
            )
