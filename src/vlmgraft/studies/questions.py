"""What an analysis asks, the lab's exam or a question file, and the models it asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmgraft.analysis.exams import SuiteExam
from vlmgraft.errors import DataError
from vlmgraft.evaluation.items import merge_suites
from vlmgraft.evaluation.readers import load_suite
from vlmgraft.hf.data import load_questions
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.lab.asked import LabExam
from vlmgraft.lab.exam import MAX_NEW_TOKENS
from vlmgraft.training.teacher import build_targets

LAB = "lab"


@dataclass(frozen=True)
class Asked:
    """data: `lab`, or what `vlmgraft evaluate` reads: question files, data sets, benchmarks (`mathvista`, `pope`);
    several together. reasoning: categories or tasks that count as reasoning, all others are perception; None: as the
    data says. samples: the first so many rows of each, of the lab so many sums and a quarter of it per kind of
    perception. drift: a question file on whose answers the KL from the VLM is measured; the lab has its own.
    split, seed: of the lab.
    """

    data: tuple[str, ...] = (LAB,)
    reasoning: tuple[str, ...] | None = None
    samples: int | None = None
    drift: str | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16
    split: Any = "validation"
    seed: int = 0

    def exam(self, processor: Any) -> LabExam | SuiteExam:
        """The questions, read and checked; raises DataError."""
        if self.data == (LAB,):
            sums = self.samples or 200
            return LabExam(processor, split=self.split, seed=self.seed, sums=sums, each=max(1, sums // 4))
        suites = [load_suite(source, limit=self.samples) for source in self.data]
        return SuiteExam(
            merge_suites(suites),
            processor,
            reasoning=self.reasoning,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )

    def drift_from(self, model: Any, processor: Any, exam: Any) -> Callable[[Any], float] | None:
        """A function that measures a model's KL from this one, in nats per token; None without questions for it."""
        if isinstance(exam, LabExam):
            asked, length, size = exam.drifting(), MAX_NEW_TOKENS, 48
        elif self.drift is not None:
            asked, length, size = load_questions(self.drift), 64, self.batch_size
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
