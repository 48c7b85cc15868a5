"""What the gated model must agree with: batches of a teacher's answers with the teacher's distributions on them.

`Targets` serve three purposes: the calibration set (teacher: the original VLM), held-out prompts on which the drift is
measured, and the donor's own answers to text questions (teacher: the donor). `teacher.py` makes them. Batches are kept
on the CPU and moved to the model's device one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlmgraft.hf.capture import Captured, plain, replay, replay_hidden
from vlmgraft.hf.data import Batch
from vlmgraft.hf.models import output_head
from vlmgraft.training.distribution import Distribution
from vlmgraft.training.processes import process, shared

HEAD_ROWS = 1024
"""Logits of more tokens than this are made, compared and dropped in pieces: 152,000 float32 logits a token add up."""


@dataclass(frozen=True)
class TargetBatch:
    """One batch: the student's inputs (raw and, where replay is exact, captured), answer positions, and targets."""

    inputs: Batch
    captured: Captured | None
    predicts: Tensor
    target: Distribution

    def logits(self, model: Any) -> Float[Tensor, "N vocabulary"]:
        """The student's logits at the tokens that count."""
        predicts = self.predicts.to(model.device)
        if self.captured is not None:
            return replay(model, moved(self.captured, model.device), predicts)
        return plain(model, moved(self.inputs, model.device), predicts)

    def kl(self, model: Any) -> Float[Tensor, " N"]:
        """KL(teacher ‖ model) per token that counts."""
        target = self.target.to(model.device)
        if self.captured is None or len(target.log_p) <= HEAD_ROWS:
            return target.kl(self.logits(model))
        head = output_head(model)

        def piece(rows: Tensor, start: int) -> Tensor:
            return target.rows(start, start + len(rows)).kl(head(rows))

        pieces = self._hidden(model).split(HEAD_ROWS)
        kept = [checkpoint(piece, rows, at * HEAD_ROWS, use_reentrant=False) for at, rows in enumerate(pieces)]
        return torch.cat(kept)

    def distribution(self, model: Any) -> Distribution:
        """The model's own distributions at the tokens that count: the target, when it is the teacher."""
        if self.captured is None or int(self.predicts.sum()) <= HEAD_ROWS:
            return Distribution.of(self.logits(model))
        head = output_head(model)
        parts = [Distribution.of(head(rows)) for rows in self._hidden(model).split(HEAD_ROWS)]
        ids = [part.ids for part in parts if part.ids is not None]
        return Distribution(torch.cat([part.log_p for part in parts]), torch.cat(ids) if ids else None)

    def _hidden(self, model: Any) -> Float[Tensor, "N hidden"]:
        """Hidden states at the tokens that count, of a captured batch."""
        assert self.captured is not None
        return replay_hidden(model, moved(self.captured, model.device))[self.predicts.to(model.device)]

    def tokens(self) -> int:
        """How many tokens the student reads, padding included."""
        return self.predicts.numel()


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

    def first(self, questions: int) -> Targets:
        """The first batches with at least so many questions in all; the whole, where it has fewer."""
        count = taken = 0
        while count < questions and taken < len(self.batches):
            count, taken = count + len(self.batches[taken].predicts), taken + 1
        return self if taken == len(self.batches) else Targets(self.batches[:taken], count, ())

    @property
    def digest(self) -> str:
        """Fingerprint of answers, batches and the teacher's distributions' shapes: a training goes on only with it."""
        state = hashlib.sha256(repr(self.answers).encode())
        for batch in self.batches:
            state.update(batch.inputs["input_ids"].cpu().numpy().tobytes())
            state.update(batch.predicts.cpu().numpy().tobytes() + repr(batch.target.log_p.shape).encode())
        return state.hexdigest()[:16]

    @torch.no_grad()
    def mean_kl(self, model: Any, *, replayed: bool = True) -> float:
        """KL(teacher ‖ model) averaged over all tokens that count; `replayed=False` for a model with other embeddings.

        Under torch.distributed the batches are shared out, and every process gets the whole average.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, weight in shared(self.batches):
            if replayed:
                kl = batch.kl(model)
            else:
                logits = plain(model, moved(batch.inputs, model.device), batch.predicts.to(model.device))
                kl = batch.target.to(model.device).kl(logits)
            sums += weight * torch.tensor([float(kl.double().sum()), len(kl)], dtype=torch.float64)
        if process()[1] > 1:
            sums = sums.to(model.device)
            torch.distributed.all_reduce(sums)
        return float(sums[0] / sums[1])


def join_targets(parts: Sequence[Targets]) -> Targets:
    """The targets of several teachers as one set, for donor matching with several donors."""
    if len(parts) == 1:
        return parts[0]
    batches = tuple(batch for part in parts for batch in part.batches)
    return Targets(batches, sum(part.questions for part in parts), tuple(a for part in parts for a in part.answers))


def moved(value: Any, device: torch.device | str) -> Any:
    """Every tensor inside dictionaries, lists and tuples on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    return value
