"""Gates for the points of a sweep, learned on the model that is loaded already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vlmgraft.alignment import Alignment
from vlmgraft.errors import RecipeError
from vlmgraft.hf.models import load_processor, load_text_model
from vlmgraft.learning import gated_method, read_questions
from vlmgraft.methods.curvature import Curvature
from vlmgraft.recipe import Recipe
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gates import Gates
from vlmgraft.spectral.svd import rank_for_energy
from vlmgraft.training.curvature import curvature_gates, curvature_start, estimate_curvature
from vlmgraft.training.distill import Distiller

Progress = Callable[[int, int, str], None]
LEARNED = ("inject", "inject_weight", "kl_budget", "granularity", "steps", "learning_rate", "seed")


class GateBench:
    """One model for many trainings: the teacher's and the donor's answers are cached, the model is put back."""

    def __init__(self, model: Any, processor: Any, progress: Progress | None = None) -> None:
        self.model, self.processor, self.progress = model, processor, progress
        self._distillers: dict[str, Distiller] = {}
        self._cache: dict[str, Any] = {}

    def gates_of(
        self, recipe: Recipe, alignment: Alignment, factors: Mapping[str, Factors]
    ) -> tuple[Gates, Mapping[str, Factors]]:
        """The gates of a `frism` or `curvature` recipe, and the factors, truncated as it says, that they belong to."""
        method = gated_method(recipe)
        if getattr(recipe, "more_donors", ()):
            raise RecipeError("more_donors: a sweep learns gates of one donor; sweep the donors one by one")
        learned, held_out, text = read_questions(recipe)
        key = repr((method.calibration, method.rank, method.seed, recipe.donor, recipe.modules, recipe.layers))
        if key not in self._distillers:
            self._distillers[key] = Distiller(
                self.model,
                self.processor,
                {name: truncated(one, method.rank) for name, one in factors.items()},
                learned,
                held_out,
                max_new_tokens=method.calibration.max_new_tokens,
                batch_size=method.calibration.batch_size,
                seed=method.seed,
                progress=self.progress,
            )
        distiller = self._distillers[key]
        if isinstance(method, Curvature):
            cached = f"curvature {key} {method.draws}"
            if cached not in self._cache:
                self._cache[cached] = estimate_curvature(distiller, draws=method.draws, seed=method.seed)
            made = curvature_gates(distiller, method.scale, method.kl_budget, curvature=self._cache[cached])
            return made, distiller.factors
        donor = None
        if method.inject == "donor":
            cached = f"donor {key} {method.questions}"
            if cached not in self._cache:
                path = alignment.donor.path
                speaker = load_text_model(path, self.model.dtype, self.model.device)
                self._cache[cached] = distiller.donor_targets(speaker, load_processor(path), text[0])
            donor = self._cache[cached]
        settings: dict[str, Any] = {field: getattr(method, field) for field in LEARNED}
        if method.start == "curvature" and method.kl_budget is not None:
            settings["start"] = curvature_start(distiller, method.scale, method.kl_budget, seed=method.seed)
        return distiller.learn(method.scale, donor=donor, **settings), distiller.factors


def truncated(factors: Factors, rank: Any) -> Factors:
    """The first directions of full factors, as a decomposition to `rank` gives them."""
    if rank == "full":
        return factors
    spectra = factors.s.reshape(-1, factors.s.shape[-1])
    count = rank if isinstance(rank, int) else max(rank_for_energy(s, rank["energy"]) for s in spectra)
    return replace(factors, U=factors.U[..., :count], s=factors.s[..., :count], Vh=factors.Vh[..., :count, :])
