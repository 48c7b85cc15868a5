"""The teacher's distribution with a rest bucket, and replay of the text model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmgraft.errors import DataError
from vlmgraft.hf.capture import capture_text_inputs, plain, replay, replay_is_exact
from vlmgraft.hf.data import Question, append_answers, encode
from vlmgraft.training import distribution, teacher
from vlmgraft.training.distill import Distiller
from vlmgraft.training.distribution import Distribution


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
    monkeypatch.setattr(distribution, "FULL_VOCABULARY", 10)
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


def test_vocabularies_of_different_padding_are_compared_on_what_they_share() -> None:
    teacher = draw(3, 20, 0)
    padded = torch.cat([teacher, torch.full((3, 4), -3.0)], dim=1)
    assert torch.allclose(Distribution.of(teacher).kl(padded), torch.zeros(3), atol=1e-5)


def test_replay_gives_the_ordinary_logits(vlm: Any, processor: Any, questions: list[Question]) -> None:
    inputs, predicts = append_answers(encode(processor, questions[:3]), [[20, 21], [22], [23, 24, 25]], 0)
    captured = capture_text_inputs(vlm, inputs)
    assert "inputs_embeds" in captured and "pixel_values" not in captured
    with torch.no_grad():
        assert torch.allclose(replay(vlm, captured, predicts), plain(vlm, inputs, predicts), atol=1e-5)
    assert replay_is_exact(vlm, inputs, predicts)


def test_a_model_whose_logits_are_scaled_is_not_replayed(
    vlm: Any, processor: Any, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, predicts = append_answers(encode(processor, questions[:2]), [[20], [22]], 0)
    ordinary = type(vlm).forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = ordinary(self, *args, **kwargs)
        output.logits = output.logits / 2
        return output

    monkeypatch.setattr(type(vlm), "forward", scaled)
    assert not replay_is_exact(vlm, inputs, predicts)


def test_without_replay_the_gates_are_the_same(distiller: Distiller, monkeypatch: pytest.MonkeyPatch) -> None:
    with_replay = distiller.learn(steps=3, inject_weight=0.1)
    monkeypatch.setattr(teacher, "replay_is_exact", lambda *args: False)
    slow = Distiller(
        distiller.model, distiller.processor, distiller.factors, distiller.questions, max_new_tokens=6, batch_size=12
    )
    assert slow.targets.batches[0].captured is None and distiller.targets.batches[0].captured is not None
    assert slow.targets.answers == distiller.targets.answers
    without = slow.learn(steps=3, inject_weight=0.1)
    for name, logits in with_replay.logits.items():
        assert torch.allclose(logits, without.logits[name], atol=2e-3)


def test_questions_without_answers_are_refused(vlm: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "generate_batch", lambda *args: ([[vlm.generation_config.eos_token_id], []], [3, 3]))
    with pytest.raises(DataError, match="empty for 2 of 2 questions, first 'sum'"):
        teacher.build_targets((vlm, processor), (vlm, processor), [Question("sum"), Question("colour 1")])
    with pytest.raises(DataError, match="no questions"):
        teacher.build_targets((vlm, processor), (vlm, processor), [])
