"""Predict whether perception survives a merge, from the KL on your own prompts and from measurements on other pairs.

The KL of task arithmetic from the VLM is measured in memory at several λ: the VLM answers the prompts once, and its
answers are scored once per λ. A logistic curve over the logarithm of the KL, fitted to pairs whose loss of perception
was measured (listed in docs/explanation/rules.md), gives the chance that perception falls by at most two points. Gains
in reasoning are not predicted: no predictor that was tried exceeded an AUROC of 0.7.
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
"""Of the log odds as a linear function of log KL (nats per token), from benchmarks/results/lab/prediction.md."""


@dataclass(frozen=True)
class Prediction:
    """scale: λ. kl: KL of task arithmetic at λ from the VLM, nats per token. holds: chance, 0 to 1, that perception
    falls by at most two points."""

    scale: float
    kl: float
    holds: float


def chance_that_perception_holds(kl: float) -> float:
    """Chance that perception falls by at most two points, from the KL of any merge on image prompts, nats per token."""
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
    """Predict task arithmetic of a recipe's models, modules and layers at every λ of `scales`; its method is ignored.

    Args:
        questions: a question file, or questions, with the kinds of images that matter; answers are not read.
    Raises:
        RecipeError, AlignmentError: the pair does not fit, or has no donor_base. DataError: the questions cannot be
            asked. CheckpointError: the VLM cannot be loaded. WeightsError: an input is not finite.
    """
    prompts = load_questions(questions) if isinstance(questions, str | Path) else list(questions)
    alignment = pair(read_recipe(recipe, (), need_method=False))
    with Rebuilder(alignment) as rebuilder:
        first = rebuilder.weights(TaskArithmetic(scales[0]))  # a mismatch is found before the model is loaded
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
