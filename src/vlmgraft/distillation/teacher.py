"""The teacher's outputs, computed once: greedy answers, and distributions on their tokens (or on all text tokens).

Both are kept in a `UnitCache`, a batch at a time: an interruption loses one batch, and a second run computes nothing.
The student's inputs are not cached, since the processor and the frozen vision tower give them again. If a model teaches
itself, it decodes each image and runs the vision tower on it only once, when it answers. The features are kept with the
answers; the processor's other outputs for an image follow from the image's size.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vlmgraft.data.endpoint import Endpoint
from vlmgraft.data.questions import questions_digest
from vlmgraft.distillation.cache import Unit, UnitCache, digest, teacher_digest
from vlmgraft.distillation.prompts import Prompts, Side, Tokens, before_placeholders, placeholders
from vlmgraft.distillation.servers import Generate, check_own, served
from vlmgraft.distillation.targets import FULL_VOCABULARY, TOP_K, Distribution, TargetBatch, Targets
from vlmgraft.errors import DataError
from vlmgraft.hf.batches import (
    Progress,
    Question,
    batches,
    cut,
    generate_batch,
    prompt_lengths,
)
from vlmgraft.hf.features import ImageFeatures
from vlmgraft.hf.modules import is_sharded
from vlmgraft.storage.resources import out_of_memory
from vlmgraft.storage.torchrun import process

Packing = Literal["shuffle", "length"]


def build_targets(teacher: Side, student: Side, questions: Sequence[Question], **settings: Any) -> Targets:
    """The teacher's greedy answers and distributions, and the student's inputs for the same answers.

    teacher, student: (model, processor or tokenizer); the same pair when a model teaches itself. They share token ids.
    settings: as `teacher_outputs` takes them. Raises DataError when there is nothing to learn from.
    """
    return teacher_outputs(teacher, questions, student, **settings).targets(student)


@dataclass(frozen=True)
class TeacherOutputs:
    """A teacher's answers to questions and its distributions on them, for any student, without the teacher itself.

    distributions: one per batch. batches: as the teacher read them, if it is also the student; else empty.
    """

    prompts: Prompts
    distributions: tuple[Distribution, ...]
    batches: tuple[TargetBatch, ...]

    @torch.no_grad()
    def targets(self, student: Side) -> Targets:
        """The same answers, in the batches that a student learns from."""
        prompts = replace(self.prompts, side=student)
        read = self.batches or map(prompts.batch, range(len(self.distributions)))
        pairs = zip(read, self.distributions, strict=True)
        batches = tuple(replace(batch, target=distribution) for batch, distribution in pairs)
        return Targets(batches, len(prompts.questions), tuple(tuple(answer) for answer in prompts.answers))


@torch.no_grad()
def teacher_outputs(
    teacher: Side,
    questions: Sequence[Question],
    student: Side,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 48,
    answer_batch_size: int | None = None,
    answer_batch_tokens: int | None = None,
    batch_tokens: int | None = None,
    packing: Packing = "shuffle",
    tokens: Tokens = "answer",
    seed: int = 0,
    cache: Path | None = None,
    endpoint: Endpoint | None = None,
    progress: Progress | None = None,
) -> TeacherOutputs:
    """The teacher's greedy answers and its distributions on them.

    student: the model that learns from them; if it is not the teacher, only its config is read, so that it may be on
    the meta device. answer_batch_size: questions answered at once, by default `batch_size`. answer_batch_tokens,
    batch_tokens: most tokens in a batch, padding included, for answering and for training. packing: "shuffle" mixes
    questions in a batch, "length" puts similar lengths together (less padding, less mixing). tokens: which positions
    count: those of the answer, or of all text, prompt included. cache: a folder that keeps the teacher's answers and
    distributions. endpoint: a server of the same model that answers. Raises DataError when there is nothing to learn
    from, or the answers are another model's.
    """
    if not questions:
        raise DataError("no questions to learn from: give at least one")
    if tokens not in ("answer", "all"):
        raise DataError(f'tokens: {tokens!r} is neither "answer" nor "all"')
    answering = answer_batch_size or batch_size
    limit = answer_batch_tokens if endpoint is None else None
    answer_batches = answer_groups(teacher[1], questions, answering, limit, max_new_tokens)
    depends = [questions_digest(questions), max_new_tokens, answering] if cache else []
    if answer_batches != answer_groups(teacher[1], questions, answering):
        depends.append(limit)
    key = digest(teacher_digest(*teacher), *depends) if cache else ""
    key += "-served" if cache and endpoint else ""
    units = UnitCache(cache, key)
    image_tokens = placeholders(teacher[0]) | placeholders(student[0])
    features = ImageFeatures(teacher[0], image_tokens)
    generate = _generation(teacher, max_new_tokens) if endpoint is None else served(teacher, max_new_tokens, endpoint)
    answers, lengths = _answers(generate, questions, answer_batches, units, features, progress)
    answers = [before_placeholders(image_tokens, answer) for answer in answers]
    _check_answers(teacher[0], questions, answers)
    lengths = [prompt + len(answer) for prompt, answer in zip(lengths, answers, strict=True)]
    groups = pack(questions, lengths, batch_size, packing, seed, batch_tokens)
    prompts = Prompts(teacher, questions, answers, groups, image_tokens, tokens, features)
    packed = (packing, batch_size, batch_tokens, seed)
    kind = "targets-" + digest(packed, tokens, TOP_K, FULL_VOCABULARY, sorted(image_tokens))[:8]
    distributions, batches = _distributions(prompts, teacher[0] is student[0], units, kind, endpoint, progress)
    for_student = Prompts(student, questions, answers, groups, image_tokens, tokens)  # does not keep the teacher
    return TeacherOutputs(for_student, distributions, batches)


def _distributions(
    prompts: Prompts, own: bool, units: UnitCache, kind: str, endpoint: Endpoint | None, progress: Progress | None
) -> tuple[tuple[Distribution, ...], tuple[TargetBatch, ...]]:
    """The teacher's distributions on its answers, one per batch, kept under `kind`. own: the teacher is also the
    student; the batches as it read them are then returned too."""
    model, fresh = prompts.side[0], dict[int, TargetBatch]()

    def log_probabilities(index: int) -> Unit:
        with out_of_memory("reading the teacher's answers", "lower batch_size or max_new_tokens"):
            batch = prompts.batch(index, replayed=own)
            target = batch.distribution(model)
        if endpoint is not None:
            check_own(prompts, index, target, endpoint, units)
        if own:
            fresh[index] = batch
        return {"log_p": target.log_p} | ({} if target.ids is None else {"ids": target.ids.int()})

    distributions, batches, count = list[Distribution](), list[TargetBatch](), len(prompts.groups)
    for index, unit in enumerate(units.run(kind, count, log_probabilities)):
        distributions.append(Distribution(unit["log_p"].cpu(), unit["ids"].long().cpu() if "ids" in unit else None))
        if own:
            batches.append(fresh.pop(index) if index in fresh else prompts.batch(index))
        if progress is not None:
            progress(index + 1, count, "targets")
    return tuple(distributions), tuple(batches)


def _generation(teacher: Side, max_new_tokens: int) -> Generate:
    """Answers that the teacher itself generates."""
    # sharded processes generate in step: each continues as long as another one still answers
    together = {"synced_gpus": True} if is_sharded(teacher[0]) and process()[1] > 1 else {}
    return lambda questions: generate_batch(*teacher, questions, max_new_tokens, together)


def _answers(
    generate: Generate,
    questions: Sequence[Question],
    groups: Sequence[Sequence[int]],
    cache: UnitCache,
    features: ImageFeatures,
    progress: Progress | None,
) -> tuple[list[list[int]], list[int]]:
    """The greedy answers as token ids and the prompts' lengths in tokens, in the order of the questions. groups: the
    questions that are answered at once."""

    def answer(index: int) -> Unit:
        with features.recorded() as images:
            replies, prompts = generate([questions[i] for i in groups[index]])
        flat = torch.tensor([token for reply in replies for token in reply], dtype=torch.int64)
        return {
            "lengths": torch.tensor([len(reply) for reply in replies]),
            "tokens": flat,
            "prompts": torch.tensor(prompts),
            **images,
        }

    answers: list[list[int]] = [[] for _ in questions]
    lengths = [0] * len(questions)
    done = 0
    for indices, unit in zip(groups, cache.run("answers", len(groups), answer), strict=True):
        rows = unit["tokens"].split(unit["lengths"].tolist())
        for index, answer_ids, length in zip(indices, rows, unit["prompts"].tolist(), strict=True):
            answers[index], lengths[index] = answer_ids.tolist(), length
        features.keep(indices, unit)
        done += len(indices)
        if progress is not None:
            progress(done, len(questions), "answers")
    return answers, lengths


def answer_groups(
    processor: Any, questions: Sequence[Question], batch_size: int, batch_tokens: int | None = None, answer: int = 0
) -> list[list[int]]:
    """Questions answered at once: at most `batch_size`, and `batch_tokens` with padding and `answer` tokens each."""
    if not batch_tokens:
        return batches(questions, batch_size)
    lengths = [length + answer for length in prompt_lengths(processor, questions)]
    return batches(questions, batch_size, lengths, batch_tokens)


def _check_answers(model: Any, questions: Sequence[Question], answers: Sequence[Sequence[int]]) -> None:
    """Warn about questions with an empty answer, which teach next to nothing; raise DataError if all are empty.

    An answer is empty when it has no token, or only end tokens.
    """
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or [])
    pairs = zip(questions, answers, strict=True)
    empty = [question.question for question, answer in pairs if not set(answer) - ends]
    if not empty:
        return
    note = f"the teacher's answer is empty for {len(empty)} of {len(questions)} questions, first {empty[0][:60]!r}"
    if len(empty) == len(questions):
        raise DataError(f"{note}; use questions that the model answers")
    warnings.warn(f"{note}; there is little to learn from them", stacklevel=3)


def pack(
    questions: Sequence[Question],
    lengths: Sequence[int],
    batch_size: int,
    packing: Packing,
    seed: int,
    batch_tokens: int | None = None,
) -> list[list[int]]:
    """Indices in batches of at most `batch_size` questions and `batch_tokens` tokens (padding included; a longer one is
    alone), images and plain text apart; "length" puts similar lengths (in tokens, images included) together."""
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    if packing == "length":
        order.sort(key=lambda i: lengths[i])
    elif packing != "shuffle":
        raise DataError(f'packing: {packing!r} is neither "shuffle" nor "length"')
    groups = ([i for i in order if questions[i].images], [i for i in order if not questions[i].images])
    return [batch for group in groups for batch in cut(group, lengths, batch_size, batch_tokens or sum(lengths))]
