"""`inspect`: how far the weights moved, how the models differ, and which base the donor was tuned from.

Some differences are harmless (a longer context); others change what a weight means: task vectors of attention weights
transfer badly between models with different rotary frequencies or heads. The donor's base is the candidate with the
shortest task vector: DeepSeek-R1-Distill-Qwen-7B, for example, was tuned from Qwen2.5-Math-7B, not from Qwen2.5-7B,
from which Qwen2.5-VL descends. A task vector from the wrong base also contains the difference of the two bases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmgraft.alignment.align import Alignment
from vlmgraft.alignment.differences import Difference, config_differences
from vlmgraft.alignment.distance import Distance, Extent, extent_of, measure_distances
from vlmgraft.alignment.view import TextView, text_view
from vlmgraft.errors import RecipeError
from vlmgraft.recipe.resolve import RecipeSource, pair, read_recipe
from vlmgraft.storage.files import make_folder
from vlmgraft.storage.jsonl import write_json, write_rows
from vlmgraft.storage.listed import listed
from vlmgraft.storage.locks import at_work
from vlmgraft.storage.outputs import refuse_place
from vlmgraft.storage.progress import Progress

if TYPE_CHECKING:
    from vlmgraft.checkpoint.index import Checkpoint

CLEAR = 1.5
"""A base is reported as the donor's if the next one's task vector is at least this many times as long; our choice."""


def differences(alignment: Alignment) -> tuple[Difference, ...]:
    """All differences of configs, biases and vocabulary rows between the VLM and donor, donor base and VLM base."""
    rows: list[Difference] = []
    for key, checkpoint in alignment.opened.items():
        if key != "vlm":
            rows += config_differences(alignment.vlm, checkpoint, key)
            rows += _of_headers(alignment, checkpoint, key)
    return tuple(rows)


def _of_headers(alignment: Alignment, other: Checkpoint, key: str) -> Iterator[Difference]:
    theirs = text_view(other)
    ours = {tensor.role for tensor in alignment.tensors if tensor.role}
    for kind, ending in (("biases", ".bias"), ("query and key norms", "_norm.weight")):
        counts = [sum(role.endswith(ending) and "layers." in role for role in names) for names in (ours, theirs.parts)]
        if counts[0] != counts[1]:
            meaning = f"{kind} in the layers that only one side has stay as the VLM has them"
            yield Difference(kind, key, counts[0], counts[1], "note", meaning)
    rows = _rows(alignment), _embedding_rows(theirs, other)
    if None not in rows and rows[0] != rows[1]:
        yield Difference("embedding rows", key, *rows, "note", "only the shared rows could be merged")


def _rows(alignment: Alignment) -> int | None:
    name = next((tensor.name for tensor in alignment.tensors if tensor.role == "embed_tokens.weight"), None)
    return alignment.vlm.tensors[name].shape[0] if name else None


def _embedding_rows(view: TextView, checkpoint: Checkpoint) -> int | None:
    entry = view.parts.get("embed_tokens.weight")
    return checkpoint.tensors[entry[0].name].shape[0] if entry else None


@dataclass(frozen=True)
class Candidate:
    """One possible base: ‖τ‖ and ‖τ_vlm‖ over all merged tensors with it, relative to ‖W_vlm‖."""

    base: str
    donor_ratio: float
    vlm_ratio: float
    rows: tuple[Distance, ...]


def compare_bases(
    alignments: Mapping[str, Alignment], progress: Callable[[int, int, str], None] | None = None
) -> tuple[Candidate, ...]:
    """Candidates by name of the base, the one nearest to the donor first. Raises AlignmentError."""
    candidates = []
    for base, alignment in alignments.items():
        rows = measure_distances(alignment, progress)
        weight = math.hypot(*(row.weight_norm for row in rows))
        donor, vlm = (math.hypot(*(getattr(row, f"{who}_norm") for row in rows)) for who in ("donor", "vlm"))
        candidates.append(Candidate(base, donor / weight, vlm / weight, rows))
    return tuple(sorted(candidates, key=lambda candidate: candidate.donor_ratio))


def name_base(candidates: Sequence[Candidate]) -> str:
    """A sentence on which base explains the donor best; `candidates` in the order of `compare_bases`."""
    best, *others = candidates
    if not others:
        return f"from {best.base}, the only base given, ‖τ‖ is {best.donor_ratio:.3f} of ‖W‖"
    if best.donor_ratio == 0:
        return f"{best.base} holds the donor's very weights; it is not its base"
    times = others[0].donor_ratio / best.donor_ratio
    compared = f"{others[0].base} leaves a task vector {times:.1f} times as long as {best.base}"
    if times >= CLEAR:
        return f"the donor was tuned from {best.base}: {compared}"
    return f"{best.base} is nearest, but not clearly: {compared}; ask the donor's model card"


@dataclass(frozen=True)
class Inspection:
    """extent: summary of the distances. distances: per layer and group. spectra: per matrix, if requested. bases: the
    candidates, nearest first. base: a sentence on which of them the donor was tuned from."""

    extent: Extent
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
        bases = [{key: getattr(base, key) for key in ("base", "donor_ratio", "vlm_ratio")} for base in self.bases]
        facts = {"extent": asdict(self.extent), "base": self.base, "bases": bases}
        write_json(folder / "inspection.json", {**facts, "differences": [asdict(row) for row in self.differences]})


def inspect_weights(
    recipe: RecipeSource | Mapping[str, Any],
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
    loaded = read_recipe(recipe, need_method=False)
    names = list(dict.fromkeys([*([loaded.donor_base] if loaded.donor_base else []), *listed(bases)]))
    if not names:
        raise RecipeError("donor_base: missing; distances are measured from the model the donor was tuned from")
    if out is not None:  # before hours of measuring
        refuse_place(out, [loaded.vlm, loaded.donor, *names])
    alignments = {name: pair(loaded.model_copy(update={"donor_base": name})) for name in names}
    candidates = compare_bases(alignments, progress)
    nearest = alignments[candidates[0].base]
    measured: tuple[Any, ...] = ()
    if spectra:
        from vlmgraft.analysis.spectra import measure_spectra

        measured = tuple(
            sorted(measure_spectra(nearest, progress), key=lambda row: -1 if row.layer is None else row.layer)
        )
    rows = candidates[0].rows
    inspection = Inspection(extent_of(rows), rows, differences(nearest), candidates, name_base(candidates), measured)
    if out is not None:
        with at_work(out, "writing", "run it where there is more memory", [loaded.vlm, loaded.donor, *names]):
            inspection.save(Path(out))
    return inspection
