"""What the teacher says, computed once: its greedy answers and its log-probabilities on their tokens.

`Targets` serve three purposes: the calibration set that the gated model must agree with (teacher: the original VLM),
held-out prompts on which the drift is measured, and the donor's own answers to text questions (teacher: the donor).
Small vocabularies are kept whole, others as the 64 likeliest tokens and one bucket for the rest (gradient cosine
≥ 0.997 against the whole).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vlmgraft.errors import DataError
from vlmgraft.hf.capture import Captured, capture_text_inputs, plain, replay, replay_is_exact
from vlmgraft.hf.data import Batch, Progress, Question, append_answers, encode, generate_ids, to_device
from vlmgraft.hf.models import tokenizer_of

FULL_VOCABULARY = 4096
TOP_K = 64


@dataclass(frozen=True)
class Distribution:
    """The teacher's log-probabilities at N answer tokens.

    ids None: `log_p` [N, vocabulary] is whole. Otherwise `log_p` [N, k + 1] belongs to `ids` [N, k], and its last
    column is the logarithm of the probability of everything else.
    """

    log_p: Float[Tensor, "N k"]
    ids: Int[Tensor, "N k"] | None

    @classmethod
    def of(cls, logits: Float[Tensor, "N vocabulary"], top_k: int = TOP_K) -> Distribution:
        """From the teacher's logits."""
        log_p = logits.float().log_softmax(-1)
        if log_p.shape[-1] <= max(FULL_VOCABULARY, top_k):
            return cls(log_p, None)
        values, ids = log_p.topk(top_k, dim=-1)
        return cls(torch.cat([values, _log_rest(values)], dim=-1), ids)

    def kl(self, logits: Float[Tensor, "N vocabulary"]) -> Float[Tensor, " N"]:
        """KL(teacher ‖ student) per token in nats; with a rest bucket it is a lower bound of the whole one."""
        log_q = logits.float().log_softmax(-1)
        if self.ids is not None:
            values = log_q.gather(-1, self.ids)
            log_q = torch.cat([values, _log_rest(values)], dim=-1)
        elif log_q.shape[-1] != self.log_p.shape[-1]:  # vocabularies of one family differ by unused rows at the end
            shared = min(log_q.shape[-1], self.log_p.shape[-1])
            log_p = self.log_p[:, :shared].log_softmax(-1)
            return F.kl_div(log_q[:, :shared].log_softmax(-1), log_p, reduction="none", log_target=True).sum(-1)
        return F.kl_div(log_q, self.log_p, reduction="none", log_target=True).sum(-1)


def _log_rest(values: Tensor) -> Tensor:
    """log(1 − Σ exp(values)), at least 1e-7 inside the logarithm: below it float32 sums are rounding noise."""
    return torch.log((1 - values.exp().sum(-1, keepdim=True)).clamp_min(1e-7))


@dataclass(frozen=True)
class TargetBatch:
    """One batch: the student's inputs (raw and, where replay is exact, captured), answer positions, and targets."""

    inputs: Batch
    captured: Captured | None
    predicts: Tensor
    target: Distribution

    def logits(self, model: Any) -> Float[Tensor, "N vocabulary"]:
        """The student's logits at the answer tokens."""
        if self.captured is not None:
            return replay(model, self.captured, self.predicts)
        return plain(model, self.inputs, self.predicts)

    def kl(self, model: Any) -> Float[Tensor, " N"]:
        """KL(teacher ‖ model) per answer token."""
        return self.target.kl(self.logits(model))


@dataclass(frozen=True)
class Targets:
    """Cached targets for a set of questions; `answers` are the teacher's, as token ids."""

    batches: tuple[TargetBatch, ...]
    questions: int
    answers: tuple[tuple[int, ...], ...]

    def order(self, seed: int) -> Iterator[TargetBatch]:
        """Batches without end, every epoch in a new order that only depends on the seed."""
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
            for index in torch.randperm(len(self.batches), generator=generator).tolist():
                yield self.batches[index]
            epoch += 1

    @torch.no_grad()
    def mean_kl(self, model: Any, *, replayed: bool = True) -> float:
        """KL(teacher ‖ model) averaged over all answer tokens; `replayed=False` for a model with other embeddings."""
        total, tokens = 0.0, 0
        for batch in self.batches:
            kl = batch.kl(model) if replayed else batch.target.kl(plain(model, batch.inputs, batch.predicts))
            total, tokens = total + float(kl.double().sum()), tokens + len(kl)
        return total / tokens


@torch.no_grad()
def build_targets(
    teacher: tuple[Any, Any],
    student: tuple[Any, Any],
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 48,
    packing: str = "shuffle",
    seed: int = 0,
    progress: Progress | None = None,
) -> Targets:
    """Cache the teacher's greedy answers and log-probabilities, and the student's inputs for the same answers.

    teacher, student: (model, processor or tokenizer); the same pair when a model teaches itself. They share token ids.
    packing: "shuffle" mixes questions in a batch, "length" puts similar lengths together (less padding, less mixing).
    """
    if not questions:
        raise DataError("no questions to learn from: give at least one")
    answers = generate_ids(*teacher, questions, max_new_tokens, batch_size, progress)
    answers = [_before_placeholder(student[0], answer) for answer in answers]
    _check_answers(questions, answers)
    exact: bool | None = None
    made = []
    groups = _pack(questions, answers, batch_size, packing, seed)
    for done, indices in enumerate(groups, start=1):
        chosen, replies = [questions[i] for i in indices], [answers[i] for i in indices]
        inputs, predicts = _with_answers(student, chosen, replies)
        if exact is None:
            exact = replay_is_exact(student[0], inputs, predicts)
        captured = capture_text_inputs(student[0], inputs) if exact else None
        if teacher[0] is student[0]:
            batch = TargetBatch(inputs, captured, predicts, Distribution(torch.empty(0), None))
            made.append(TargetBatch(inputs, captured, predicts, Distribution.of(batch.logits(teacher[0]))))
        else:
            target = Distribution.of(plain(teacher[0], *_with_answers(teacher, chosen, replies)))
            target = Distribution(target.log_p.to(predicts.device), _moved(target.ids, predicts.device))
            made.append(TargetBatch(inputs, captured, predicts, target))
        if progress is not None:
            progress(done, len(groups), "targets")
    return Targets(tuple(made), len(questions), tuple(tuple(answer) for answer in answers))


def _check_answers(questions: Sequence[Question], answers: Sequence[Sequence[int]]) -> None:
    """Questions without an answer teach nothing: say so, and refuse when all are empty."""
    empty = [question.question for question, answer in zip(questions, answers, strict=True) if not answer]
    if not empty:
        return
    note = f"the teacher's answer is empty for {len(empty)} of {len(questions)} questions, first {empty[0][:60]!r}"
    if len(empty) == len(questions):
        raise DataError(f"{note}; use questions that the model answers")
    warnings.warn(f"{note}; they are not learned from", stacklevel=3)


def _before_placeholder(model: Any, answer: list[int]) -> list[int]:
    """The answer up to the first image or video placeholder: read back as input, it would ask for an image."""
    keys = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    placeholders = {getattr(model.config, key, None) for key in keys} - {None}
    return answer[: next((at for at, token in enumerate(answer) if token in placeholders), len(answer))]


def _with_answers(side: tuple[Any, Any], questions: Sequence[Question], answers: Sequence[Sequence[int]]) -> Any:
    model, processor = side
    pad = tokenizer_of(processor).pad_token_id or 0
    inputs, predicts = append_answers(encode(processor, questions), answers, pad)
    return to_device(inputs, model.device, model.dtype), predicts.to(model.device)


def _pack(
    questions: Sequence[Question], answers: Sequence[Sequence[int]], batch_size: int, packing: str, seed: int
) -> list[list[int]]:
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    if packing == "length":
        order.sort(key=lambda i: (len(questions[i].images), len(questions[i].prompt) + 4 * len(answers[i])))
    elif packing != "shuffle":
        raise DataError(f'packing: {packing!r} is neither "shuffle" nor "length"')
    groups = ([i for i in order if questions[i].images], [i for i in order if not questions[i].images])
    return [group[at : at + batch_size] for group in groups for at in range(0, len(group), batch_size)]


def _moved(ids: Tensor | None, device: torch.device) -> Tensor | None:
    return None if ids is None else ids.to(device)
