"""Predict whether perception survives a merge: the KL on prompts of your own, read by what it meant for other pairs.

The KL from the VLM of task arithmetic at several λ, in memory: the prompts are answered once, and read once for each λ.
Pairs on which the same was measured beside what perception lost (docs/explanation/rules.md has them all) give the
chance that perception falls by no more than two points, as a logistic curve over the logarithm of the KL. Whether
reasoning will gain is not predicted: what was tried told it no better than AUROC 0.7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmgraft.analysis.eval_data import KL_TOKENS, open_vlm
from vlmgraft.analysis.in_memory import Rebuilder, swapped, text_parameters
from vlmgraft.data.questions import Question
from vlmgraft.distillation.teacher import build_targets
from vlmgraft.hf.batches import load_questions
from vlmgraft.methods.task_arithmetic import TaskArithmetic
from vlmgraft.recipe.resolve import RecipeSource, pair, read_recipe
from vlmgraft.storage.progress import Progress

SCALES = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
INTERCEPT, SLOPE = -13.41, -3.23
"""Of the log odds over the KL in nats per token, as benchmarks/results/lab/prediction.md has them."""


@dataclass(frozen=True)
class Prediction:
    """scale: λ. kl: of task arithmetic at λ from the VLM, nats per token. holds: chance, 0 to 1, that perception falls
    by at most two points."""

    scale: float
    kl: float
    holds: float


def chance_that_perception_holds(kl: float) -> float:
    """From a KL in nats per token on image prompts, of any merge."""
    if kl <= 0:
        return 1.0
    odds = INTERCEPT + SLOPE * math.log(kl)
    return 1 / (1 + math.exp(-odds)) if odds > -700 else 0.0


def predict_perception(
    recipe: RecipeSource,
    questions: str | Path | Sequence[Question],
    *,
    scales: Sequence[float] = SCALES,
    max_new_tokens: int = KL_TOKENS,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> tuple[Prediction, ...]:
    """Task arithmetic of a recipe's pair, in its modules and layers, at every λ of `scales`; its method plays no part.

    Args:
        questions: a question file, or questions, with images of the kinds that shall be kept; answers are not read.
    Raises:
        RecipeError, AlignmentError: the pair does not fit, or has no donor_base. DataError: the questions cannot be
            asked. CheckpointError: the VLM cannot be loaded. WeightsError: an input is not finite.
    """
    prompts = load_questions(questions) if isinstance(questions, str | Path) else list(questions)
    alignment = pair(read_recipe(recipe, (), need_method=False))
    with Rebuilder(alignment) as rebuilder:
        first = rebuilder.weights(TaskArithmetic(scales[0]))  # what does not fit is found before the model is loaded
        teacher = open_vlm(alignment.vlm.path)
        parameters = text_parameters(teacher[0])
        with swapped(parameters, first):  # weights that cannot be exchanged are found before questions are answered
            pass
        targets = build_targets(
            teacher, teacher, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
        )
        predictions = list[Prediction]()
        for scale in scales:
            weights = first if scale == scales[0] else rebuilder.weights(TaskArithmetic(scale))
            with swapped(parameters, weights):
                kl = targets.mean_kl(teacher[0])
            predictions.append(Prediction(scale, kl, chance_that_perception_holds(kl)))
    return tuple(predictions)
