"""`inspect --distances`: how far the models moved, what they do not share, and whether to merge them at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmgraft import pipeline
from vlmgraft.alignment.distance import Distance, Verdict, judge
from vlmgraft.analysis.bases import Candidate, compare_bases, name_base
from vlmgraft.analysis.differences import Difference, differences
from vlmgraft.errors import RecipeError
from vlmgraft.folders import make_folder
from vlmgraft.locks import at_work
from vlmgraft.records import write_json, write_rows

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Inspection:
    """distances: per layer and group. spectra: per matrix, when asked for. bases: the candidates, nearest first, and
    `base`, which of them the donor was tuned from, in words."""

    verdict: Verdict
    distances: tuple[Distance, ...]
    differences: tuple[Difference, ...]
    bases: tuple[Candidate, ...]
    base: str
    spectra: tuple[Any, ...] = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The distances with their ratios."""
        return [{**asdict(row), "ratio": row.ratio, "vlm_ratio": row.vlm_ratio} for row in self.distances]

    def save(self, folder: Path) -> None:
        """Write distances.jsonl, spectra.jsonl and inspection.json, which `vlmgraft report` reads."""
        make_folder(folder)
        write_rows(folder / "distances.jsonl", self.rows)
        if self.spectra:
            write_rows(folder / "spectra.jsonl", self.spectra)
        bases = [{"base": one.base, "donor_ratio": one.donor_ratio, "vlm_ratio": one.vlm_ratio} for one in self.bases]
        found = {"verdict": asdict(self.verdict), "base": self.base, "bases": bases}
        write_json(folder / "inspection.json", {**found, "differences": [asdict(one) for one in self.differences]})


def inspect_weights(
    recipe: pipeline.RecipeSource | Mapping[str, Any],
    *,
    bases: Sequence[str] = (),
    spectra: bool = False,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Stream through the weights once per candidate base, and through τ once more for its spectra.

    Args:
        bases: further models that the donor may have been tuned from, beside the recipe's donor_base; the distances,
            differences and spectra are those of the nearest.
        out: a folder for the rows.
    Raises:
        RecipeError: no base is given. AlignmentError, CheckpointError: as for a merge.
    """
    loaded = pipeline.read_recipe(recipe, need_method=False)
    names = list(dict.fromkeys([*([loaded.donor_base] if loaded.donor_base else []), *bases]))
    if not names:
        raise RecipeError("donor_base: missing; distances are measured from the model the donor was tuned from")
    alignments = {name: pipeline.pair(loaded.model_copy(update={"donor_base": name})) for name in names}
    candidates = compare_bases(alignments, progress)
    nearest = alignments[candidates[0].base]
    measured: tuple[Any, ...] = ()
    if spectra:
        from vlmgraft.analysis.spectra import measure_spectra

        measured = tuple(measure_spectra(nearest, progress))
    rows = candidates[0].rows
    found = Inspection(judge(rows), rows, differences(nearest), candidates, name_base(candidates), measured)
    if out is not None:
        with at_work(out, "writing", "run it where there is more memory"):
            found.save(Path(out))
    return found
