"""`kl_divergence`: how far a model's answers are from the VLM's, on prompts of your own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from vlmgraft.analysis.eval_data import open_vlm
from vlmgraft.distillation.teacher import build_targets
from vlmgraft.hf.batches import Progress, Question, load_questions
from vlmgraft.hf.steering import Steering


def kl_divergence(
    model: str | Path,
    vlm: str | Path,
    questions: str | Path | Sequence[Question],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    steer: str | Path | None = None,
    steer_strength: float | None = None,
    progress: Progress | None = None,
) -> float:
    """KL(P_vlm ‖ P_model) in nats per token of the VLM's own greedy answers: what `kl_budget` bounds.

    Measured on a saved checkpoint, so that rounding to its dtype is included. On questions that the gates were not
    learned on, it shows whether a budget holds.

    Args:
        questions: a question file, or questions; answers are not read.
        steer: a file that `steer` wrote, applied to `model` at `steer_strength` (None: its own).
    Raises:
        DataError: there are no questions, or they do not fit the model's context. CheckpointError: a model cannot be
            loaded.
    """
    prompts = load_questions(questions) if isinstance(questions, str | Path) else list(questions)
    teacher = open_vlm(vlm)
    targets = build_targets(
        teacher, teacher, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    del teacher
    loaded = open_vlm(model)[0]
    with nullcontext() if steer is None else Steering.load(steer).applied(loaded, steer_strength):
        return targets.mean_kl(loaded, replayed=False)
