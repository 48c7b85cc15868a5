"""The rules that fit a recipe, each with a strength that its KL grows with, and the strength that meets a given KL.

Strength 0 gives the VLM; for rules that also trim the VLM's own task vector, the trimmed VLM without a donor. The
recipe's own method is a contender if it has gates: they are learned at the budget, and λ is their strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmgraft.alignment import Alignment
from vlmgraft.analysis.in_memory import Rebuilder
from vlmgraft.distillation.budget import TOLERANCE, largest_within
from vlmgraft.distillation.learn import check_questions, factors_for, gates_for
from vlmgraft.errors import NumericalError, RecipeError
from vlmgraft.methods.frism import GatedMethod
from vlmgraft.recipe.model import Recipe, dump_recipe, load_recipe
from vlmgraft.recipe.resolve import resolve
from vlmgraft.spectral.factor_store import open_store
from vlmgraft.spectral.gate_store import save_gates
from vlmgraft.storage.progress import Progress

LEAST = 2.0**-10
"""Share of a rule's largest strength below which none is tried: a rule whose KL exceeds the budget there drops out."""


@dataclass(frozen=True)
class Rule:
    """options: the recipe's `method` at a strength from 0 to `limit`. needs: checkpoints that the recipe must name.
    A rule without a strength has `limit` 0 and is compared as it is."""

    options: Callable[[float], dict[str, Any]]
    limit: float = 4.0
    needs: tuple[str, ...] = ("donor_base",)


def _spectral(rule: str, limit: float = 4.0) -> Rule:
    return Rule(lambda x: {"name": "spectral", "rule": rule, "scale": x}, limit)


def _weighted(name: str, **more: Any) -> Rule:
    return Rule(lambda x: {"name": name, "weights": [1.0, x], **more}, needs=("donor_base", "vlm_base"))


RULES: Mapping[str, Rule] = {
    "task_arithmetic": Rule(lambda x: {"name": "task_arithmetic", "scale": x}),
    "linear": Rule(lambda x: {"name": "linear", "vlm_weight": 1 - x}, 1.0, ()),
    "slerp": Rule(lambda x: {"name": "slerp", "t": x}, 1.0, ()),
    "sar": _spectral("sar", 64.0),
    "truncate": _spectral("truncate"),
    "rank_1": _spectral("rank_k"),
    "rank_1_interpolated": Rule(lambda x: {"name": "spectral", "rule": "rank_k", "scale": x, "interpolation": x}, 1.0),
    "star": _spectral("star"),
    "ties": _weighted("ties"),
    "dare_ties": _weighted("dare_ties"),
    "della": _weighted("della"),
    "breadcrumbs": _weighted("breadcrumbs"),
    "ip_merging": Rule(lambda x: {"name": "ip_merging", "scale": x}, needs=("donor_base", "vlm_base")),
    "sce": Rule(lambda x: {"name": "sce"}, 0.0, ("donor_base", "vlm_base")),
    "model_stock": Rule(lambda x: {"name": "model_stock"}, 0.0, ("donor_base", "vlm_base")),
}
"""Cheap rules first. Left out: Iso-C, a negative control, and FRANK, which needs measured shares of attention."""


def fitting(recipe: Recipe, wanted: Sequence[str] | None = None) -> list[str]:
    """Names of the rules whose checkpoints the recipe names, its own gated method last.

    Raises RecipeError for a wanted rule that does not exist or lacks a checkpoint.
    """
    gated = [recipe.method.name] if isinstance(recipe.method, GatedMethod) else []
    missing = {name: [key for key in rule.needs if getattr(recipe, key) is None] for name, rule in RULES.items()}
    for name in wanted or ():
        if name not in (*RULES, *gated):
            raise RecipeError(f"rules: {name!r} is none of {', '.join((*RULES, *gated))}")
        if missing.get(name):
            raise RecipeError(f"rules: {name} needs {missing[name][0]}; name it in the recipe")
    return [name for name in (*RULES, *gated) if (name in wanted if wanted else not missing.get(name))]


class Contenders:
    """The contenders of one race: recipes and merged weights at any strength. folder: for factors and gates."""

    def __init__(
        self, recipe: Recipe, alignment: Alignment, rebuilder: Rebuilder, budget: float, folder: Path,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.alignment, self.rebuilder = recipe, alignment, rebuilder
        self.budget, self.folder, self.progress = budget, folder, progress
        self._bases: dict[str, Any] = {}

    def check(self, names: Sequence[str]) -> None:
        """Validate every contender's recipe and its questions before a model is loaded."""
        for name in names:
            job = resolve(self.recipe_at(name, min(1.0, self.limit(name))))
            if isinstance(job.recipe.method, GatedMethod):
                check_questions(job)

    def limit(self, name: str) -> float:
        """The largest strength of a contender."""
        return RULES[name].limit if name in RULES else 4.0

    def recipe_at(self, name: str, strength: float) -> Recipe:
        """The recipe that `merge` runs. Of a gated method it holds the budget; the strength is applied to the gates."""
        if name in RULES:
            method = RULES[name].options(strength)
        else:
            budgeted = {"kl_budget": self.budget} | ({"inject_weight": None} if name == "frism" else {})
            method = dump_recipe(self.recipe.model_copy(update={"method": replace(self.recipe.method, **budgeted)}))
            method = method["method"]
        return load_recipe({**dump_recipe(self.recipe), "method": method})

    def weights(self, name: str, strength: float) -> dict[str, Tensor]:
        """Role → merged tensor at a strength, float32."""
        if name in RULES:
            return self.rebuilder.weights(self.recipe_at(name, strength).method)
        gates, factors = self._gates(name)
        spectra = {key: strength * gates.spectrum(key, factors[key].s) for key in gates.logits}
        return self.rebuilder.with_spectra(spectra, factors)

    def _gates(self, name: str) -> tuple[Any, Mapping[str, Any]]:
        """The gates as learned at the budget, at strength 1, and their factors; both stored in `folder/name`."""
        if name not in self._bases:
            work = self.folder / name
            job = resolve(self.recipe_at(name, 1.0))
            factors_for(job, work / "factors", resume=True, progress=self.progress)
            store = open_store(work / "factors", training=True)
            gates = gates_for(job, store, work / "gates", self.progress)
            learned = replace(gates, scale=gates.scale / gates.settings.get("strength", 1.0))
            self._bases[name] = learned, store
        return self._bases[name]

    def keep(self, name: str, strength: float) -> Recipe:
        """The recipe that merges a contender at its strength; gates are stored at that strength in `folder/name`."""
        if name not in RULES:
            gates, _ = self._gates(name)
            settings = {**gates.settings, "strength": strength}
            save_gates(replace(gates, scale=gates.scale * strength, settings=settings), self.folder / name / "gates")
        return self.recipe_at(name, strength)

    def strength_within(self, name: str, kl_of: Callable[[Mapping[str, Tensor]], float]) -> tuple[float | None, float]:
        """The strength whose KL is just within the budget, and that KL; None and the least strength's KL if none is.

        kl_of: KL from the VLM of the VLM with these weights swapped in, nats per token.
        """

        def kl_at(strength: float) -> float:
            try:
                return kl_of(self.weights(name, strength))
            except NumericalError:
                return math.inf

        limit = self.limit(name)
        if limit == 0:
            kl = kl_at(1.0)
            return (1.0 if kl <= self.budget * (1 + TOLERANCE) else None), kl
        shift, kl = largest_within(lambda x: kl_at(limit * 2.0 ** (x - 3)), self.budget, math.log2(LEAST) + 3, 3.0)
        return (limit * 2.0 ** (shift - 3) if kl <= self.budget else None), kl
