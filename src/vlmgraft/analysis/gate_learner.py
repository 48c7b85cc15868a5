"""Gates for the points of a sweep, learned on the model that is already loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlmgraft.alignment import Alignment
from vlmgraft.distillation.curvature import FisherDiagonal, estimate_curvature
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.learn import learned_gates
from vlmgraft.distillation.loading import reading_of
from vlmgraft.distillation.targets import Targets
from vlmgraft.errors import RecipeError
from vlmgraft.hf.models import load_processor, load_text_model
from vlmgraft.methods.curvature import Curvature
from vlmgraft.methods.frism import Frism
from vlmgraft.recipe.model import Recipe
from vlmgraft.recipe.resolve import Questions, gated_method
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gates import Gates
from vlmgraft.spectral.rank import Rank, directions_kept
from vlmgraft.storage.progress import Progress


class GateLearner:
    """One model for many trainings: the teacher's and the donor's answers are cached, the weights are restored."""

    def __init__(self, model: Any, processor: Any, progress: Progress | None = None) -> None:
        self.model, self.processor, self.progress = model, processor, progress
        self._distillers: dict[str, Distiller] = {}
        self._curvatures: dict[str, FisherDiagonal] = {}
        self._donors: dict[str, Targets] = {}

    def gates_of(
        self, recipe: Recipe, questions: Questions, alignment: Alignment, factors: Mapping[str, Factors]
    ) -> tuple[Gates, Mapping[str, Factors]]:
        """Learn the gates of a `frism` or `curvature` recipe; also returns their factors, cut to the recipe's rank.

        questions: as `read_questions` returns them.
        """
        method = gated_method(recipe)
        if recipe.more_donors:
            raise RecipeError("more_donors: a sweep learns gates of one donor; sweep the donors one by one")
        learned, held_out, text, _ = questions
        key = repr((method.calibration, method.rank, method.seed, recipe.donor, recipe.modules, recipe.layers))
        if key not in self._distillers:
            kept = {name: truncated(matrix, method.rank) for name, matrix in factors.items()}
            self._distillers[key] = Distiller(
                self.model, self.processor, kept, learned, held_out, progress=self.progress, **reading_of(method)
            )
        distiller = self._distillers[key]
        curvature = donor = None
        if isinstance(method, Curvature):
            known = f"{key} {method.draws}"
            if known not in self._curvatures:
                self._curvatures[known] = estimate_curvature(distiller, draws=method.draws, seed=method.seed)
            curvature = self._curvatures[known]
        if isinstance(method, Frism) and method.inject == "donor":
            known = f"{key} {method.questions} {method.donor_length}"
            if known not in self._donors:
                path = alignment.donor.path
                model = load_text_model(path, self.model.dtype, self.model.device)
                self._donors[known] = distiller.donor_targets(
                    model, load_processor(path), text[0], max_new_tokens=method.donor_length
                )
            donor = self._donors[known]
        return learned_gates(distiller, method, donor, curvature=curvature), distiller.factors


def truncated(factors: Factors, rank: Rank) -> Factors:
    """The first directions of full factors, as a decomposition to `rank` gives them."""
    count = directions_kept(factors.s, rank)
    return replace(factors, U=factors.U[..., :count], s=factors.s[..., :count], Vh=factors.Vh[..., :count, :])
