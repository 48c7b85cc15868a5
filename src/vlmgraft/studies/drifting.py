"""`drift`: how far a model's answers are from the VLM's, on prompts of your own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmgraft.hf.data import Progress, Question, load_questions
from vlmgraft.studies.questions import open_vlm
from vlmgraft.training.teacher import build_targets


def drift(
    model: str | Path,
    vlm: str | Path,
    questions: str | Path | Sequence[Question],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> float:
    """KL(P_vlm ‖ P_model) in nats per token of the VLM's own greedy answers: what `kl_budget` bounds.

    Of a finished folder, so that rounding to the checkpoint's dtype counts too; on questions that gates were not
    learned on, it says what a budget was worth.

    Args:
        questions: a question file, or questions; answers are not read.
    Raises:
        DataError: there are no questions, or they do not fit the model's context. CheckpointError: a model cannot be
            loaded.
    """
    asked = load_questions(questions) if isinstance(questions, str | Path) else list(questions)
    own = open_vlm(vlm)
    targets = build_targets(own, own, asked, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    del own
    return targets.mean_kl(open_vlm(model)[0], replayed=False)
