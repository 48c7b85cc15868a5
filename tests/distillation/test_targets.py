"""The teacher's distribution with a rest bucket, and what is kept of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vlmgraft.distillation import prompts, targets
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.targets import Distribution


def draw(rows: int, size: int, seed: int) -> torch.Tensor:
    return 4 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def kl_naive(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 40), st.integers(0, 9999))
def test_a_whole_distribution_gives_the_plain_kl(rows: int, size: int, seed: int) -> None:
    teacher, student = draw(rows, size, seed), draw(rows, size, seed + 1)
    found = Distribution.of(teacher).kl(student)
    assert torch.allclose(found.double(), kl_naive(teacher, student), atol=1e-4)
    assert torch.allclose(Distribution.of(teacher).kl(teacher), torch.zeros(rows), atol=1e-6)


def test_the_rest_bucket_is_a_close_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "FULL_VOCABULARY", 10)
    teacher, student = draw(50, 500, 0), draw(50, 500, 0) + 0.3 * draw(50, 500, 1) / 4
    cut, whole = Distribution.of(teacher, top_k=64), kl_naive(teacher, student)
    assert cut.ids is not None and cut.log_p.shape == (50, 65)
    assert torch.allclose(cut.log_p.exp().sum(-1), torch.ones(50), atol=1e-5)
    found = cut.kl(student).double()
    assert bool((found <= whole + 1e-5).all()) and float(found.mean()) > 0.9 * float(whole.mean())
    gradients = []
    for loss in (lambda z: cut.kl(z).sum(), lambda z: kl_naive(teacher, z).sum()):
        z = student.clone().requires_grad_()
        loss(z).backward()
        gradients.append(z.grad.flatten().double())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.997


def test_the_whole_divergence_lies_between_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that differs from the teacher only in the rest: the lower bound does not see it, the upper one does."""
    monkeypatch.setattr(targets, "FULL_VOCABULARY", 10)
    teacher = draw(50, 500, 0)
    cut = Distribution.of(teacher, top_k=64)
    assert cut.ids is not None
    rest = torch.ones_like(teacher).scatter(-1, cut.ids, 0.0).bool()
    order = torch.where(rest, -teacher, torch.inf)
    reversed_rest = teacher.clone()
    for row in range(50):  # the rest's logits in the opposite order
        places = order[row].argsort()[: int(rest[row].sum())]
        reversed_rest[row, places] = teacher[row, places.flip(0)]
    for student in (reversed_rest, draw(50, 500, 7), teacher):
        whole = kl_naive(teacher, student)
        lower, upper = cut.bounds(student).double()
        assert lower.equal(cut.kl(student).double())
        assert bool((lower <= whole + 1e-4).all()) and bool((whole <= upper + 1e-4).all())
    assert float(cut.kl(reversed_rest).max()) < 1e-3 < float(kl_naive(teacher, reversed_rest).mean())
    full = Distribution.of(teacher, top_k=500)
    assert full.ids is None and all(bound.equal(full.kl(reversed_rest)) for bound in full.bounds(reversed_rest))


def test_vocabularies_of_different_padding_are_compared_on_what_they_share() -> None:
    teacher = draw(3, 20, 0)
    padded = torch.cat([teacher, torch.full((3, 4), -3.0)], dim=1)
    assert torch.allclose(Distribution.of(teacher).kl(padded), torch.zeros(3), atol=1e-5)


def test_without_replay_the_gates_are_the_same(distiller: Distiller, monkeypatch: pytest.MonkeyPatch) -> None:
    with_replay = distiller.learn(steps=3, inject_weight=0.1)
    monkeypatch.setattr(prompts, "replay_is_exact", lambda *args: False)
    slow = Distiller(
        distiller.model, distiller.processor, distiller.factors, distiller.questions, max_new_tokens=6, batch_size=12
    )
    assert slow.targets.batches[0].captured is None and distiller.targets.batches[0].captured is not None
    assert slow.targets.answers == distiller.targets.answers
    without = slow.learn(steps=3, inject_weight=0.1)
    for name, logits in with_replay.logits.items():
        assert torch.allclose(logits, without.logits[name], atol=2e-3)


def test_parts_hold_every_batch_once_and_similar_lengths_apart(distiller: Distiller) -> None:
    """24 questions in batches of 12 give two parts at 12 or fewer a part, and one where that is fewer than half."""
    whole = distiller.targets
    assert [len(batch.predicts) for batch in whole.batches] == [12, 12]
    first, second = whole.parts(12)
    assert (first.batches, second.batches) == (whole.batches[:1], whole.batches[1:])
    assert first.questions == second.questions == 12 and first.tokens + second.tokens == whole.tokens
    assert whole.tokens == sum(len(answer) for answer in whole.answers)
    assert whole.parts(1) == whole.parts(12) and [part.batches for part in whole.parts(100)] == [whole.batches]


@pytest.mark.parametrize(("size", "whole"), [(4096, True), (4097, False)])
def test_a_distribution_is_kept_whole_up_to_4096_words_and_else_64_of_them(size: int, whole: bool) -> None:
    found = Distribution.of(torch.zeros(1, size))
    assert (found.ids is None) == whole and found.log_p.shape == (1, size if whole else 65)


def test_long_answers_are_read_in_pieces_that_add_up_to_the_whole(
    distiller: Distiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, model = distiller.targets.batches[0], distiller.model
    count = int(batch.predicts.sum())
    sizes: list[int] = []
    head = targets.head_logits
    monkeypatch.setattr(targets, "head_logits", lambda model, rows: sizes.append(len(rows)) or head(model, rows))
    with torch.no_grad():
        known = batch.distribution(model).log_p, batch.kl(model), batch.bounds(model)
        sizes.clear()
        monkeypatch.setattr(targets, "HEAD_ROWS", 5)
        pieces = batch.distribution(model).log_p, batch.kl(model), batch.bounds(model)
    for one, other in zip(known, pieces, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert count > 10 and max(sizes) == 5 and sum(sizes) == 3 * count


def test_every_epoch_has_an_order_of_its_own_by_the_seed(distiller: Distiller) -> None:
    whole = replace(distiller.targets, batches=tuple(range(8)))  # type: ignore[arg-type]
    expected = [torch.randperm(8, generator=torch.Generator().manual_seed(3 * 100_003 + epoch)) for epoch in range(3)]
    assert list(islice(whole.order(3), 24)) == torch.cat(expected).tolist()


def test_small_models_are_compared_with_one_thread(distiller: Distiller, threads_seen: list[int]) -> None:
    for replayed in (True, False):
        distiller.targets.mean_kl(distiller.model, replayed=replayed)
        assert set(threads_seen) == {1}
        threads_seen.clear()
