"""From a recipe to a plan: its checkpoints opened and aligned, and what a merge would do, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.hub import open_headers
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError
from vlmgraft.merging.plan import MergePlan, plan_merge
from vlmgraft.methods.base import check_numbers
from vlmgraft.methods.frism import GatedFold
from vlmgraft.recipe import Recipe, load_recipe

RecipeSource = str | Path | Mapping[str, Any] | Recipe


@dataclass(frozen=True)
class Plan:
    """What a merge would do, from headers alone: counts by verdict, bytes written, notes, one row per tensor.

    cost: files, bytes, expected seconds and memory of the streaming (for FRISM without decomposition and gates); None
    when the recipe names no method.
    """

    family: str
    layers: int
    merged: int
    kept: int
    excluded: int
    nbytes: int
    notes: tuple[str, ...]
    tensors: tuple[dict[str, Any], ...]
    cost: MergePlan | None = None


def read_recipe(recipe: RecipeSource, overrides: Sequence[str] = (), *, need_method: bool = True) -> Recipe:
    """A validated recipe from a file, or the given one; raises RecipeError."""
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides, need_method=need_method)


def pair(recipe: Recipe, *, headers_only: bool = False) -> Alignment:
    """Open the recipe's checkpoints (headers) and align them; raises CheckpointError and AlignmentError."""
    opener = open_headers if headers_only else open_checkpoint
    optional = [opener(source) if source else None for source in (recipe.donor_base, recipe.vlm_base)]
    return align(opener(recipe.vlm), opener(recipe.donor), *optional, modules=recipe.modules, layers=recipe.layers)


def pairs(recipe: Recipe) -> list[Alignment]:
    """One alignment per donor of the recipe; raises as `pair`, and AlignmentError if their tensors differ."""
    every = [pair(recipe)]
    for other in recipe.more_donors:
        every.append(pair(recipe.model_copy(update={"donor": other.donor, "donor_base": other.donor_base})))
        odd = {tensor.name for tensor in every[0].merged} ^ {tensor.name for tensor in every[-1].merged}
        if odd:
            raise AlignmentError(f"{sorted(odd)[0]}: not all donors have it; leave it out of `modules`")
    return every


def inspect(recipe: RecipeSource, overrides: Sequence[str] = ()) -> Plan:
    """What pairs with what, reading headers only (of hub ids by range requests)."""
    loaded = read_recipe(recipe, overrides, need_method=False)
    return plan(loaded, pair(loaded, headers_only=True))


def plan(recipe: Recipe, alignment: Alignment) -> Plan:
    """The plan of a recipe whose checkpoints are aligned; raises RecipeError for options that fit no tensor."""
    cost = None
    if recipe.method is not None:
        streamed: Any = GatedFold if hasattr(recipe.method, "bind") else recipe.method
        check_numbers(recipe.method, alignment)
        cost = plan_merge(alignment, streamed, recipe.output.shard_bytes)
    verdicts = [tensor.verdict for tensor in alignment.tensors]
    rows = tuple(
        {
            "name": tensor.name,
            "verdict": tensor.verdict,
            "reason": tensor.reason,
            "shape": list(alignment.vlm.tensors[tensor.name].shape),
            "dtype": alignment.vlm.tensors[tensor.name].dtype,
            "donor": list(tensor.donor.names) if tensor.donor else [],
        }
        for tensor in alignment.tensors
    )
    counts = {verdict: verdicts.count(verdict) for verdict in ("merged", "kept", "excluded")}
    nbytes = sum(info.nbytes for info in alignment.vlm.tensors.values())
    return Plan(
        alignment.family, alignment.layers, **counts, nbytes=nbytes, notes=alignment.notes, tensors=rows, cost=cost
    )
