"""The teacher's part, done once: its greedy answers, and its distributions on their tokens (or on all text tokens).

Both are kept in a `UnitCache`, a batch at a time, so that an interruption costs one batch and a second run nothing.
The student's inputs are made anew: they are what the processor and the frozen vision tower give.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vlmgraft.errors import DataError
from vlmgraft.hf.capture import capture_text_inputs, replay_is_exact
from vlmgraft.hf.data import (
    Progress,
    Question,
    append_answers,
    batches,
    encode,
    generate_batch,
    text_positions,
    to_device,
)
from vlmgraft.hf.models import tokenizer_of
from vlmgraft.resources import out_of_memory
from vlmgraft.training.cache import Unit, UnitCache, digest, questions_digest, teacher_digest
from vlmgraft.training.distribution import FULL_VOCABULARY, TOP_K, Distribution
from vlmgraft.training.targets import TargetBatch, Targets, moved

Tokens = Literal["answer", "all"]
Packing = Literal["shuffle", "length"]
Side = tuple[Any, Any]

_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@torch.no_grad()
def build_targets(
    teacher: Side,
    student: Side,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 48,
    packing: Packing = "shuffle",
    tokens: Tokens = "answer",
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Targets:
    """The teacher's greedy answers and distributions, and the student's inputs for the same answers.

    teacher, student: (model, processor or tokenizer); the same pair when a model teaches itself. They share token ids.
    packing: "shuffle" mixes questions in a batch, "length" puts similar lengths together (less padding, less mixing).
    tokens: which positions count: those of the answer, or of all text, prompt included. cache: a folder to keep the
    teacher's work in. Raises DataError when there is nothing to learn from.
    """
    if not questions:
        raise DataError("no questions to learn from: give at least one")
    if tokens not in ("answer", "all"):
        raise DataError(f'tokens: {tokens!r} is neither "answer" nor "all"')
    asked = digest(teacher_digest(*teacher), questions_digest(questions), max_new_tokens, batch_size) if cache else ""
    units = UnitCache(cache, asked)
    answers, lengths = _answers(teacher, questions, max_new_tokens, batch_size, units, progress)
    stand_ins = placeholders(teacher[0]) | placeholders(student[0])
    answers = [_before(stand_ins, answer) for answer in answers]
    _check_answers(teacher[0], questions, answers)
    lengths = [prompt + len(answer) for prompt, answer in zip(lengths, answers, strict=True)]
    groups = pack(questions, lengths, batch_size, packing, seed)
    sides = {id(side[0]): _Prompts(side, questions, answers, groups, stand_ins, tokens) for side in (teacher, student)}
    reading, learning = sides[id(teacher[0])], sides[id(student[0])]

    def log_probabilities(index: int) -> Unit:
        with out_of_memory("reading the teacher's answers", "lower batch_size or max_new_tokens"):
            target = reading.batch(index, replayed=reading is learning).distribution(teacher[0])
        return {"log_p": target.log_p} | ({} if target.ids is None else {"ids": target.ids.int()})

    kind = "targets-" + digest(packing, seed, tokens, TOP_K, FULL_VOCABULARY, sorted(stand_ins))[:8]
    made: list[TargetBatch] = []
    for index, unit in enumerate(units.run(kind, len(groups), log_probabilities)):
        ids = unit["ids"].long().cpu() if "ids" in unit else None
        made.append(replace(learning.batch(index), target=Distribution(unit["log_p"].cpu(), ids)))
        if progress is not None:
            progress(index + 1, len(groups), "targets")
    return Targets(tuple(made), len(questions), tuple(tuple(answer) for answer in answers))


@dataclass
class _Prompts:
    """Prompts with the teacher's answers, as one model reads them, in batches."""

    side: Side
    questions: Sequence[Question]
    answers: Sequence[Sequence[int]]
    groups: Sequence[Sequence[int]]
    placeholders: set[int]
    tokens: Tokens
    exact: bool | None = None
    last: tuple[int, TargetBatch] | None = None

    def batch(self, index: int, *, replayed: bool = True) -> TargetBatch:
        """Batch `index` without a target, on the CPU; with the text model's inputs captured, if replay is exact."""
        if self.last is not None and self.last[0] == index:
            return self.last[1]
        model, processor = self.side
        chosen = [self.questions[i] for i in self.groups[index]]
        replies = [self.answers[i] for i in self.groups[index]]
        inputs, predicts = append_answers(encode(processor, chosen), replies, tokenizer_of(processor).pad_token_id or 0)
        if self.tokens == "all":
            predicts = text_positions(inputs, self.placeholders)
        inputs = to_device(inputs, "cpu", model.dtype)
        captured = None
        if replayed:
            here = moved(inputs, model.device)
            if self.exact is None:
                self.exact = replay_is_exact(model, here, predicts.to(model.device))
            captured = moved(capture_text_inputs(model, here), "cpu") if self.exact else None
        made = TargetBatch(inputs, captured, predicts, Distribution(torch.empty(0), None))
        self.last = (index, made)
        return made


def _answers(
    teacher: Side,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int,
    cache: UnitCache,
    progress: Progress | None,
) -> tuple[list[list[int]], list[int]]:
    """The teacher's greedy answers as token ids and the prompts' lengths in tokens, in the order of the questions."""
    groups = batches(questions, batch_size)

    def answer(index: int) -> Unit:
        found, prompts = generate_batch(*teacher, [questions[i] for i in groups[index]], max_new_tokens)
        flat = torch.tensor([token for one in found for token in one], dtype=torch.int64)
        return {"lengths": torch.tensor([len(one) for one in found]), "tokens": flat, "prompts": torch.tensor(prompts)}

    answers: list[list[int]] = [[] for _ in questions]
    lengths = [0] * len(questions)
    done = 0
    for indices, unit in zip(groups, cache.run("answers", len(groups), answer), strict=True):
        found = unit["tokens"].split(unit["lengths"].tolist())
        for index, answer_ids, length in zip(indices, found, unit["prompts"].tolist(), strict=True):
            answers[index], lengths[index] = answer_ids.tolist(), length
        done += len(indices)
        if progress is not None:
            progress(done, len(questions), "answers")
    return answers, lengths


def _check_answers(model: Any, questions: Sequence[Question], answers: Sequence[Sequence[int]]) -> None:
    """Questions with an empty answer teach next to nothing: say so, and refuse when all are empty.

    An answer is empty when it has no token, or only the one that ends it.
    """
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or [])
    said = zip(questions, answers, strict=True)
    empty = [question.question for question, answer in said if not set(answer) - ends]
    if not empty:
        return
    note = f"the teacher's answer is empty for {len(empty)} of {len(questions)} questions, first {empty[0][:60]!r}"
    if len(empty) == len(questions):
        raise DataError(f"{note}; use questions that the model answers")
    warnings.warn(f"{note}; there is little to learn from them", stacklevel=3)


def placeholders(model: Any) -> set[int]:
    """Token ids that stand for images and videos."""
    return {token for key in _PLACEHOLDERS if (token := getattr(model.config, key, None)) is not None}


def _before(placeholders: set[int], answer: list[int]) -> list[int]:
    """The answer up to the first image or video placeholder: read back as input, it would ask for an image."""
    return answer[: next((at for at, token in enumerate(answer) if token in placeholders), len(answer))]


def pack(
    questions: Sequence[Question], lengths: Sequence[int], batch_size: int, packing: Packing, seed: int
) -> list[list[int]]:
    """Indices in batches, images and plain text apart; by "length" a batch holds similar lengths (in tokens, images
    included), else a mixture."""
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    if packing == "length":
        order.sort(key=lambda i: lengths[i])
    elif packing != "shuffle":
        raise DataError(f'packing: {packing!r} is neither "shuffle" nor "length"')
    groups = ([i for i in order if questions[i].images], [i for i in order if not questions[i].images])
    return [group[at : at + batch_size] for group in groups for at in range(0, len(group), batch_size)]
