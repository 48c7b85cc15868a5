"""`sweep`: recipes over grids of their fields, on one loaded model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmgraft import pipeline
from vlmgraft.alignment import Alignment
from vlmgraft.analysis.grid import as_override, grid_points
from vlmgraft.analysis.merged import Rebuilder
from vlmgraft.analysis.sweep import Point, run_sweep
from vlmgraft.errors import RecipeError
from vlmgraft.folders import make_folder
from vlmgraft.locks import at_work
from vlmgraft.methods.base import check_numbers
from vlmgraft.methods.spectral import Spectral
from vlmgraft.recipe import Recipe, dump_recipe
from vlmgraft.records import write_json
from vlmgraft.spectral.decompose import decompose
from vlmgraft.spectral.factors import FactorStore
from vlmgraft.studies.gates import GateBench
from vlmgraft.studies.questions import Asked, open_vlm

Progress = Callable[[int, int, str], None]


def sweep(
    recipes: Mapping[str, pipeline.RecipeSource],
    grids: Sequence[str],
    out: str | Path,
    asked: Asked | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure every recipe at every point of the grids; rows in `out`/sweep.jsonl, with the Pareto front marked.

    Args:
        recipes: by the name that tables and plots give them; all of one VLM.
        grids: `key=start:stop:step` or `key=a,b,c`, or with `name:` before it for one recipe alone; a key of a method's
            options is left out for recipes whose method does not have it, and must fit one of them.
    Raises:
        RecipeError and what alignment and question files raise: before anything is measured.
    """
    asked, out = asked or Asked(), Path(out)
    named = [(name, *one) for name, source in recipes.items() for one in _points(source, _own_grids(name, grids))]
    for grid in grids:
        only, key, _ = _parts(grid)
        if not any(key in point for name, point, _ in named if only in (None, name)):
            raise RecipeError(f"--grid {grid!r}: no recipe {only or ''} has a method with this option")
    if len({loaded.vlm for _, _, loaded in named}) != 1:
        raise RecipeError("sweep: the recipes have different VLMs, and one model is loaded; sweep them one by one")
    with ExitStack() as stack:
        stack.enter_context(at_work(out, "sweeping", "lower batch_size or max_new_tokens"))
        bench = Bench(out, stack, progress)
        for _, _, loaded in named:
            bench.check(loaded)
        model, processor = open_vlm(next(iter(bench.alignments.values())).vlm.path)
        exam = asked.exam(processor)
        bench.gates = GateBench(model, processor, progress)
        points = [Point(_identity(one), name, point, partial(bench.weights, one)) for name, point, one in named]
        drift = asked.drift_from(model, processor, exam)
        rows = run_sweep(
            model, exam, points, out, {"vlm": named[0][2].vlm}, drift=drift, resume=resume, progress=progress
        )
        write_json(out / "sweep.recipes.json", {_identity(one): dump_recipe(one) for _, _, one in named})
    return rows


def _points(source: pipeline.RecipeSource, grids: Sequence[str]) -> list[tuple[dict[str, Any], Recipe]]:
    """(fields, recipe) of every grid point that the recipe's method can take."""
    plain = pipeline.read_recipe(source)
    options = {field.name for field in fields(plain.method)}
    renamed = any(grid.partition("=")[0].strip() == "method.name" for grid in grids)
    own = [grid for grid in grids if renamed or _takes(options, grid.partition("=")[0].strip())]
    base = dump_recipe(plain)
    return [
        (point, pipeline.read_recipe(base, [as_override(key, value) for key, value in point.items()]))
        for point in grid_points(own)
    ]


def _parts(grid: str) -> tuple[str | None, str, str]:
    """(recipe or None, key, the rest) of `name:key=…` or `key=…`."""
    before, equals, after = grid.partition("=")
    name, colon, key = before.rpartition(":")
    return name if colon else None, key.strip(), equals + after


def _own_grids(name: str, grids: Sequence[str]) -> list[str]:
    """The grids that a recipe is to take, without its name; its own replace general ones of the same key."""
    parts = [_parts(grid) for grid in grids]
    own = {key for only, key, _ in parts if only == name}
    return [key + rest for only, key, rest in parts if only == name or (only is None and key not in own)]


def _takes(options: set[str], key: str) -> bool:
    first, _, rest = key.partition(".")
    return first != "method" or rest.partition(".")[0] in options


def _identity(recipe: Recipe) -> str:
    plain = {key: value for key, value in dump_recipe(recipe).items() if key != "output"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


class Bench:
    """The alignments, factors and gates that the points of one sweep share."""

    def __init__(self, out: Path, stack: ExitStack, progress: Progress | None) -> None:
        self.out, self.stack, self.progress = out, stack, progress
        self.alignments: dict[str, Alignment] = {}
        self.rebuilders: dict[str, Rebuilder] = {}
        self.gates: GateBench | None = None

    def check(self, recipe: Recipe) -> None:
        """Align a recipe's checkpoints and prove its options, before anything is loaded."""
        key = _sources(recipe)
        if key not in self.alignments:
            self.alignments[key] = pipeline.pair(recipe)
        check_numbers(recipe.method, self.alignments[key])
        if hasattr(recipe.method, "bind"):
            from vlmgraft.learning import read_questions

            read_questions(recipe)

    def weights(self, recipe: Recipe) -> dict[str, Tensor]:
        """The merged tensors of one point by role, float32."""
        key = _sources(recipe)
        gated = hasattr(recipe.method, "bind")
        if key not in self.rebuilders:
            self.rebuilders[key] = self.stack.enter_context(Rebuilder(self.alignments[key]))
        rebuilder = self.rebuilders[key]
        if rebuilder.factors is None and (gated or (isinstance(recipe.method, Spectral) and _matrices(rebuilder))):
            rebuilder.factors = dict(self._factors(key))
        if gated and self.gates is not None:
            gates, factors = self.gates.gates_of(recipe, rebuilder.alignment, rebuilder.factors or {})
            return rebuilder.with_spectra({name: gates.spectrum(name, one.s) for name, one in factors.items()}, factors)
        return rebuilder.weights(recipe.method)

    def _factors(self, key: str) -> FactorStore:
        alignment = self.alignments[key]
        name = hashlib.sha256(key.encode()).hexdigest()[:8]
        make_folder(self.out)
        return decompose(alignment, self.out / f"factors-{name}", resume=True, progress=self.progress)


def _sources(recipe: Recipe) -> str:
    return repr((recipe.vlm, recipe.donor, recipe.donor_base, recipe.vlm_base, recipe.modules, recipe.layers))


def _matrices(rebuilder: Rebuilder) -> bool:
    alignment = rebuilder.alignment
    return all(len(alignment.vlm.tensors[tensor.name].shape) == 2 for tensor in alignment.merged)
