"""Training targets of the gated model: a teacher's answers in batches, with its next-token distributions on them.

A distribution is kept whole, or as the most likely tokens and a rest bucket.

`Targets` serve three purposes: the calibration set (teacher: the original VLM), held-out prompts on which the KL is
measured, and the donor's answers to text questions (teacher: the donor). `teacher.py` makes them. Batches are kept
on the CPU and moved to the model's device one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlmgraft.distillation.distributed import of_all, shared
from vlmgraft.hf.batches import Batch
from vlmgraft.hf.capture import Captured, head_logits, plain, replay, replay_hidden
from vlmgraft.hf.placement import threads_of
from vlmgraft.storage.torchrun import process

FULL_VOCABULARY = 4096
TOP_K = 64
DONOR_BATCH = 16
"""Text questions per batch in donor matching."""
HEAD_ROWS = 1024
"""Logits of more tokens than this are computed and compared in pieces: a token has 152,000 float32 logits."""


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

    def to(self, device: torch.device | str) -> Distribution:
        """The same distributions on another device."""
        return Distribution(self.log_p.to(device), None if self.ids is None else self.ids.to(device))

    def rows(self, start: int, stop: int) -> Distribution:
        """The distributions of the tokens from `start` to `stop`."""
        return Distribution(self.log_p[start:stop], None if self.ids is None else self.ids[start:stop])

    def kl(self, logits: Float[Tensor, "N vocabulary"]) -> Float[Tensor, " N"]:
        """KL(teacher ‖ student) per token in nats; with a rest bucket, a lower bound on the full KL (see `bounds`)."""
        log_q = logits.float().log_softmax(-1)
        if self.ids is not None:
            values = log_q.gather(-1, self.ids)
            log_q = torch.cat([values, _log_rest(values)], dim=-1)
        elif log_q.shape[-1] != self.log_p.shape[-1]:  # vocabularies of one family differ by unused rows at the end
            shared = min(log_q.shape[-1], self.log_p.shape[-1])
            log_p = self.log_p[:, :shared].log_softmax(-1)
            return F.kl_div(log_q[:, :shared].log_softmax(-1), log_p, reduction="none", log_target=True).sum(-1)
        return F.kl_div(log_q, self.log_p, reduction="none", log_target=True).sum(-1)

    def bounds(self, logits: Float[Tensor, "N vocabulary"]) -> Float[Tensor, "2 N"]:
        """`kl`, and an upper bound on the full KL, per token; they are equal if every probability is kept.

        Each token in the rest bucket, of total probability P, has at most the smallest kept probability p₆₄. Over the
        rest therefore Σ p log p ≤ P log p₆₄, and −Σ p log q ≤ −P min log q.
        """
        lower = self.kl(logits)
        if self.ids is None:
            return torch.stack([lower, lower])
        log_q = logits.float().log_softmax(-1)
        log_p, log_rest = self.log_p[:, :-1], self.log_p[:, -1]
        kept = (log_p.exp() * (log_p - log_q.gather(-1, self.ids))).sum(-1)
        least = log_q.scatter(-1, self.ids, torch.inf).amin(-1)
        return torch.stack([lower, kept + log_rest.exp() * (log_p[:, -1] - least)])


def _log_rest(values: Tensor) -> Tensor:
    """log(1 − Σ exp(values)), at least 1e-7 inside the logarithm: below it float32 sums are rounding noise."""
    return torch.log((1 - values.exp().sum(-1, keepdim=True)).clamp_min(1e-7))


@dataclass(frozen=True)
class TargetBatch:
    """One batch: the student's inputs, answer positions, and targets.

    If replay is exact, the text model's inputs are kept as `captured`. Pixels are not kept: `read` makes the inputs,
    images included, from the questions again.
    """

    ids: Tensor
    read: Callable[[], Batch]
    captured: Captured | None
    predicts: Tensor
    target: Distribution

    @property
    def inputs(self) -> Batch:
        """The student's inputs as its processor makes them, on the CPU."""
        return self.read()

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

        def piece(rows: Tensor, start: int) -> Tensor:
            return target.rows(start, start + len(rows)).kl(head_logits(model, rows))

        pieces = self.hidden(model).split(HEAD_ROWS)
        kept = [checkpoint(piece, rows, at * HEAD_ROWS, use_reentrant=False) for at, rows in enumerate(pieces)]
        return torch.cat(kept)

    def bounds(self, model: Any) -> Float[Tensor, "2 N"]:
        """`kl`, and an upper bound on the full KL, per token that counts; without a gradient."""
        target = self.target.to(model.device)
        if self.captured is None:
            return target.bounds(self.logits(model))
        pieces = self.hidden(model).split(HEAD_ROWS)
        bounds = [target.rows(at * HEAD_ROWS, at * HEAD_ROWS + len(rows)).bounds(head_logits(model, rows))
                  for at, rows in enumerate(pieces)]  # fmt: skip
        return torch.cat(bounds, dim=1)

    def kl_whole(self, model: Any, own: Float[Tensor, "N hidden"]) -> Float[Tensor, " N"]:
        """KL(teacher ‖ model) over the whole vocabulary, of a captured batch; own: `hidden` of the teacher."""
        pieces = zip(own.to(model.device).split(HEAD_ROWS), self.hidden(model).split(HEAD_ROWS), strict=True)
        return torch.cat([
            Distribution(head_logits(model, before).float().log_softmax(-1), None).kl(head_logits(model, after))
            for before, after in pieces
        ])  # fmt: skip

    def distribution(self, model: Any) -> Distribution:
        """The model's own distributions at the tokens that count; those of the teacher are the target."""
        if self.captured is None or int(self.predicts.sum()) <= HEAD_ROWS:
            return Distribution.of(self.logits(model))
        parts = [Distribution.of(head_logits(model, rows)) for rows in self.hidden(model).split(HEAD_ROWS)]
        ids = [part.ids for part in parts if part.ids is not None]
        return Distribution(torch.cat([part.log_p for part in parts]), torch.cat(ids) if ids else None)

    def hidden(self, model: Any) -> Float[Tensor, "N hidden"]:
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
        """Batches without end; every epoch has a new order that depends only on the seed."""
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
            for index in torch.randperm(len(self.batches), generator=generator).tolist():
                yield self.batches[index]
            epoch += 1

    def parts(self, questions: int) -> tuple[Targets, ...]:
        """Batches split into parts of about `questions` questions; similar lengths go to different parts."""
        count = max(1, min(len(self.batches), round(self.questions / questions)))
        dealt = [self.batches[part::count] for part in range(count)]
        return tuple(Targets(batches, sum(len(batch.predicts) for batch in batches), ()) for batches in dealt)

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return sum(int(batch.predicts.sum()) for batch in self.batches)

    @property
    def digest(self) -> str:
        """Fingerprint of answers, batches and the distributions' shapes; training resumes only if it is unchanged."""
        state = hashlib.sha256(repr(self.answers).encode())
        for batch in self.batches:
            state.update(batch.ids.cpu().numpy().tobytes())
            state.update(batch.predicts.cpu().numpy().tobytes() + repr(batch.target.log_p.shape).encode())
        return state.hexdigest()[:16]

    @property
    def whole(self) -> bool:
        """Whether the teacher's distributions are kept whole: KL is then exact, and not a lower bound."""
        return all(batch.target.ids is None for batch in self.batches)

    @torch.no_grad()
    def mean_kl(self, model: Any, *, replayed: bool = True) -> float:
        """KL(teacher ‖ model) averaged over all tokens that count; `replayed=False` for a model with other embeddings.

        Under torch.distributed the batches are divided among the processes; each of them gets the whole average.
        """

        def kl(batch: TargetBatch) -> Tensor:
            if replayed:
                return batch.kl(model)[None]
            logits = plain(model, moved(batch.inputs, model.device), batch.predicts.to(model.device))
            return batch.target.to(model.device).kl(logits)[None]

        return self._means(model, kl)[0]

    @torch.no_grad()
    def mean_bounds(self, model: Any) -> tuple[float, float]:
        """`mean_kl`, and its upper bound where distributions are not `whole`, in one pass."""
        lower, upper = self._means(model, lambda batch: batch.bounds(model))
        return lower, upper

    def _means(self, model: Any, figures: Callable[[TargetBatch], Tensor]) -> list[float]:
        """Averages over all tokens of the rows of `figures` [rows, N] of every batch."""
        parts: list[Tensor] = []
        for batch, weight in shared(self.batches):
            with threads_of(model):
                rows = figures(batch).double()
            own = weight * torch.cat([rows.sum(1), torch.full_like(rows[:1, 0], rows.shape[1])])
            parts += [part.cpu() for part in of_all(own if process()[1] > 1 else own.cpu())]
        total = reduce(torch.add, parts)
        return (total[:-1] / total[-1]).tolist()

    @torch.no_grad()
    def prompt_kl(self, model: Any, own: dict[int, Tensor] | None = None) -> Float[Tensor, " questions"]:
        """KL(teacher ‖ model) of every prompt, averaged over its tokens that count; float64, in the order of batches.

        With a rest bucket (vocabularies above 4,096 tokens) these are lower bounds on the full KL, unless `own` is
        given: the teacher's hidden states by batch, filled in by a first call with the teacher as the model. The KLs
        are then exact or, for batches that are not captured, upper bounds.

        Under torch.distributed the batches are divided among the processes; each of them gets all KLs.
        """
        means = torch.zeros(self.questions, dtype=torch.float64)
        starts = accumulate((len(batch.predicts) for batch in self.batches), initial=0)
        for (start, batch), weight in shared(list(zip(starts, self.batches, strict=False))):
            if own is None or batch.target.ids is None:
                kl = batch.kl(model)
            elif batch.captured is None:
                kl = batch.bounds(model)[1]
            else:
                if start not in own:
                    own[start] = batch.hidden(model).cpu()
                kl = batch.kl_whole(model, own[start])
            kl, rows = kl.double().cpu(), batch.predicts.cpu().nonzero()[:, 0]
            count = len(batch.predicts)
            sums, tokens = torch.zeros(count, dtype=kl.dtype).index_add(0, rows, kl), rows.bincount(minlength=count)
            means[start : start + count] += weight * sums / tokens.clamp(min=1)
        if process()[1] > 1:
            means = means.to(model.device)
            torch.distributed.all_reduce(means)
        return means.cpu()


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
