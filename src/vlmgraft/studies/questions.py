"""What an analysis asks, the lab's exam or a question file, and the models it asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmgraft.analysis.exams import FileExam
from vlmgraft.analysis.scores import Exam
from vlmgraft.errors import DataError
from vlmgraft.hf.data import Question, load_questions
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.lab.asked import LabExam
from vlmgraft.lab.exam import MAX_NEW_TOKENS
from vlmgraft.training.teacher import build_targets

LAB = "lab"


@dataclass(frozen=True)
class Asked:
    """source: `lab`, or a question file whose lines have `answer` and `category`. reasoning: the categories of the file
    that count as reasoning, all others are perception. samples: at most so many questions, of the lab so many sums and
    a quarter of it per kind of perception. drift: a question file on whose answers the KL from the VLM is measured; the
    lab has its own. split, seed: of the lab.
    """

    source: str = LAB
    reasoning: tuple[str, ...] | None = None
    samples: int | None = None
    drift: str | None = None
    max_new_tokens: int = 512
    batch_size: int = 16
    split: Any = "validation"
    seed: int = 0

    def exam(self, processor: Any) -> Exam:
        """The questions, read and checked; raises DataError."""
        if self.source == LAB:
            sums = self.samples or 200
            return LabExam(processor, split=self.split, seed=self.seed, sums=sums, each=max(1, sums // 4))
        return FileExam(
            self.source,
            processor,
            reasoning=self.reasoning,
            limit=self.samples,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )

    def prompts(self, exam: Any, count: int = 128) -> list[Question]:
        """Unlabelled prompts to average over: of the lab's calibration split, or the file's own questions."""
        return exam.prompts(count) if isinstance(exam, LabExam) else list(exam.questions[:count])

    def drift_from(self, model: Any, processor: Any, exam: Any) -> Callable[[Any], float] | None:
        """A function that measures a model's KL from this one, in nats per token; None without questions for it."""
        if isinstance(exam, LabExam):
            asked, length, size = exam.drifting(), MAX_NEW_TOKENS, 48
        elif self.drift is not None:
            asked, length, size = load_questions(self.drift), min(64, self.max_new_tokens), self.batch_size
        else:
            return None
        own = (model, processor)
        return build_targets(own, own, asked, max_new_tokens=length, batch_size=size).mean_kl


def open_vlm(path: str | Path) -> tuple[Any, Any]:
    """The model and its processor, on the GPU in bfloat16 if there is one, else on the CPU in float32."""
    if torch.cuda.is_available():
        return load_vlm(path, torch.bfloat16, "cuda"), load_processor(path)
    return load_vlm(path, torch.float32), load_processor(path)


def layer_list(text: str | Sequence[int] | None, depth: int) -> list[int] | None:
    """Layers as recipes write them: None or "all", "3", "0-5" or numbers; raises DataError."""
    if text is None or text == "all":
        return None
    if not isinstance(text, str):
        return list(text)
    try:
        ends = [int(part) for part in text.split("-")]
        found = list(range(ends[0], ends[-1] + 1)) if len(ends) <= 2 else []
    except ValueError:
        found = []
    if not found or max(found) >= depth:
        raise DataError(f"--layers {text!r}: write all, a number or a range such as 0-{depth - 1}")
    return found
