"""Sweep: perception and reasoning of recipes over grids of their fields, on one loaded model.

Weights are swapped in place, so a point costs a rebuild and one evaluation. Methods on singular directions share one
decomposition; gates are learned on the same loaded model.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmgraft.alignment import Alignment
from vlmgraft.analysis.bench import INPUTS, REMEDY, Bench, load_bench
from vlmgraft.analysis.eval_data import EvalData
from vlmgraft.analysis.gate_learner import GateLearner
from vlmgraft.analysis.grid_points import as_override, grid_points, pareto
from vlmgraft.analysis.in_memory import Rebuilder, swapped
from vlmgraft.checkpoint.digests import folder_digest
from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import check_numbers
from vlmgraft.methods.frism import Frism, GatedMethod
from vlmgraft.methods.spectral import Spectral
from vlmgraft.recipe.model import Recipe, dump_recipe
from vlmgraft.recipe.resolve import Questions, RecipeSource, gated_method, pair, read_questions, read_recipe
from vlmgraft.spectral.decompose import decompose
from vlmgraft.spectral.factor_store import FactorStore
from vlmgraft.storage.files import make_folder
from vlmgraft.storage.jsonl import write_json
from vlmgraft.storage.listed import listed
from vlmgraft.storage.locks import at_work
from vlmgraft.storage.progress import Progress

KEYS = ("id",)
VLM_POINT = "VLM"


@dataclass(frozen=True)
class SweepPoint:
    """One setting. id: equal for equal recipes. method: its name in tables and plots. setting: the fields of the grid.
    weights: computes the merged tensors by role, when the point is measured. inputs: a digest of its sources."""

    id: str
    method: str
    setting: Mapping[str, Any]
    weights: Callable[[], Mapping[str, Tensor]]
    inputs: str = ""

    @property
    def cell(self) -> dict[str, Any]:
        """A row's entries besides its results; `order` sorts the points of a curve."""
        numbers = [value for value in self.setting.values() if isinstance(value, int | float)]
        setting = ", ".join(f"{_short(key)} {_shown(value)}" for key, value in self.setting.items())
        order = float(numbers[0]) if numbers else 0.0
        row = {"id": self.id, "method": self.method, "setting": setting, "fields": dict(self.setting), "order": order}
        return {**row, INPUTS: self.inputs}


def run_sweep(bench: Bench, points: Sequence[SweepPoint]) -> list[dict[str, Any]]:
    """Measure the VLM and every point, write sweep.jsonl and return the rows, with the Pareto front marked.

    A row's `seconds` are the times of rebuilding the weights and of asking the questions.
    """
    vlm = SweepPoint(VLM_POINT, VLM_POINT, {}, dict)
    known = {point.id: point for point in (vlm, *points)}

    def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        weights = known[cell["id"]].weights()
        rebuilt = time.perf_counter()
        with swapped(bench.parameters, weights):
            scores = bench.ask()
        return {**scores, "seconds": {"rebuild": rebuilt - began, "ask": time.perf_counter() - rebuilt}}

    return with_front(list(bench.measure("sweep", KEYS, [point.cell for point in known.values()], measure)))


def with_front(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `front`: whether no other row is at least as good in perception and reasoning and better in one."""
    front = pareto([(row["perception"]["mean"], row["reasoning"]["mean"]) for row in rows])
    return [{**row, "front": on} for row, on in zip(rows, front, strict=True)]


def _short(key: str) -> str:
    name = key.rpartition(".")[2]
    return {"scale": "λ", "inject_weight": "α", "kl_budget": "ε"}.get(name, name)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def sweep(
    recipes: Mapping[str, RecipeSource],
    grids: Sequence[str],
    out: str | Path,
    data: EvalData | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure every recipe at every point of the grids; rows in `out`/sweep.jsonl, with the Pareto front marked.

    Args:
        recipes: by their name in tables and plots; all of one VLM.
        grids: `key=start:stop:step` or `key=a,b,c`, prefixed with `name:` for one recipe alone. An option of a method
            is skipped for recipes whose method does not have it; at least one recipe must have it.
    Raises:
        RecipeError and the errors of alignment and question files: before anything is measured.
    """
    data, out, grids = data or EvalData(), Path(out), listed(grids)
    named = [
        (name, fields_, recipe)
        for name, source in recipes.items()
        for fields_, recipe in _points(source, _grids_of(name, grids))
    ]
    for grid in grids:
        only, key, _ = _parts(grid)
        if not any(key in point for name, point, _ in named if only in (None, name)):
            raise RecipeError(f"--grid {grid!r}: no recipe {only or ''} has a method with this option")
    if len({loaded.vlm for _, _, loaded in named}) != 1:
        raise RecipeError("sweep: the recipes have different VLMs, and one model is loaded; sweep them one by one")
    with ExitStack() as stack:
        loaded = [recipe for _, _, recipe in named]
        models = {model for recipe in loaded for model in recipe.models}
        stack.enter_context(at_work(out, "sweeping", REMEDY, sorted(models), ["sweep.*", "factors*"]))
        inputs = SweepInputs(out, stack, progress)
        digests = [inputs.check(recipe) for recipe in loaded]
        vlm, settings = next(iter(inputs.alignments.values())).vlm.path, {"vlm": loaded[0].vlm}
        bench = load_bench(vlm, data, out, settings=settings, resume=resume, progress=progress)
        inputs.gates = GateLearner(bench.model, bench.processor, progress)
        points = [
            SweepPoint(_identity(recipe), name, point, partial(inputs.weights, recipe), digest)
            for (name, point, recipe), digest in zip(named, digests, strict=True)
        ]
        rows = run_sweep(bench, points)
        write_json(out / "sweep.recipes.json", {_identity(recipe): dump_recipe(recipe) for recipe in loaded})
    return rows


def _points(source: RecipeSource, grids: Sequence[str]) -> list[tuple[dict[str, Any], Recipe]]:
    """(fields, recipe) of every grid point that the recipe's method can take."""
    plain = read_recipe(source)
    options = {field.name for field in fields(plain.method)}
    renamed = any(grid.partition("=")[0].strip() == "method.name" for grid in grids)
    taken = [grid for grid in grids if renamed or _takes(options, grid.partition("=")[0].strip())]
    base = dump_recipe(plain)
    return [
        (point, read_recipe(base, [as_override(key, value) for key, value in point.items()]))
        for point in grid_points(taken)
    ]


def _parts(grid: str) -> tuple[str | None, str, str]:
    """(recipe or None, key, the rest) of `name:key=…` or `key=…`."""
    before, equals, after = grid.partition("=")
    name, colon, key = before.rpartition(":")
    return name if colon else None, key.strip(), equals + after


def _grids_of(name: str, grids: Sequence[str]) -> list[str]:
    """The grids of one recipe, without its name; its own grids override general ones of the same key."""
    parts = [_parts(grid) for grid in grids]
    special = {key for only, key, _ in parts if only == name}
    return [key + values for only, key, values in parts if only == name or (only is None and key not in special)]


def _takes(options: set[str], key: str) -> bool:
    first, _, rest = key.partition(".")
    return first != "method" or rest.partition(".")[0] in options


def _identity(recipe: Recipe) -> str:
    plain = {key: value for key, value in dump_recipe(recipe).items() if key != "output"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


class SweepInputs:
    """The alignments, factors and gates that the points of one sweep share."""

    def __init__(self, out: Path, stack: ExitStack, progress: Progress | None) -> None:
        self.out, self.stack, self.progress = out, stack, progress
        self.alignments: dict[str, Alignment] = {}
        self.contents: dict[str, list[str | None]] = {}
        self.rebuilders: dict[str, Rebuilder] = {}
        self.gates: GateLearner | None = None
        self._questions: dict[str, Questions] = {}

    def check(self, recipe: Recipe) -> str:
        """Align a recipe's checkpoints and validate its options, before a model is loaded; return a digest of the
        contents of its checkpoints and questions."""
        key = _sources(recipe)
        if key not in self.alignments:
            self.alignments[key] = pair(recipe)
            self.contents[key] = [folder_digest(opened.path) for opened in self.alignments[key].opened.values()]
        check_numbers(recipe.method, self.alignments[key])
        if isinstance(recipe.method, Frism) and recipe.method.budget_guarantee is not None:
            raise RecipeError("method.budget_guarantee: a sweep has none; remove it, or merge this recipe alone")
        questions = self.questions(recipe).digests if isinstance(recipe.method, GatedMethod) else ()
        return hashlib.sha256(repr((self.contents[key], questions)).encode()).hexdigest()[:16]

    def questions(self, recipe: Recipe) -> Questions:
        """The questions of a recipe with a gated method; what names the same is read once."""
        method = gated_method(recipe)
        texts = method.questions if isinstance(method, Frism) else None
        key = repr((method.calibration, texts, method.kl_budget is None, len(recipe.more_donors)))
        if key not in self._questions:
            self._questions[key] = read_questions(recipe)
        return self._questions[key]

    def weights(self, recipe: Recipe) -> dict[str, Tensor]:
        """The merged tensors of one point by role, float32."""
        key = _sources(recipe)
        gated = isinstance(recipe.method, GatedMethod)
        if key not in self.rebuilders:
            self.rebuilders[key] = self.stack.enter_context(Rebuilder(self.alignments[key]))
        rebuilder = self.rebuilders[key]
        if rebuilder.factors is None and (gated or (isinstance(recipe.method, Spectral) and _matrices(rebuilder))):
            rebuilder.factors = dict(self._factors(key))
        if gated and self.gates is not None:
            questions = self.questions(recipe)
            gates, factors = self.gates.gates_of(recipe, questions, rebuilder.alignment, rebuilder.factors or {})
            spectra = {name: gates.spectrum(name, matrix.s) for name, matrix in factors.items()}
            return rebuilder.with_spectra(spectra, factors)
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
