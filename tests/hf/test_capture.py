"""The text model's inputs captured and replayed: the logits are those of the ordinary forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmgraft.hf.batches import Question, append_answers, encode
from vlmgraft.hf.capture import capture_text_inputs, plain, replay, replay_is_exact


def test_replay_gives_the_ordinary_logits(vlm: Any, processor: Any, questions: list[Question]) -> None:
    inputs, predicts = append_answers(encode(processor, questions[:3]), [[20, 21], [22], [23, 24, 25]], 0)
    captured = capture_text_inputs(vlm, inputs)
    assert "inputs_embeds" in captured and "pixel_values" not in captured
    with torch.no_grad():
        assert torch.allclose(replay(vlm, captured, predicts), plain(vlm, inputs, predicts), atol=1e-5)
    assert replay_is_exact(vlm, inputs, predicts)


def test_soft_capped_logits_are_replayed(
    vlm: Any, processor: Any, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head as Gemma's, with a cap that bends this model's small logits: without it a replay is another model."""
    inputs, predicts = append_answers(encode(processor, questions[:2]), [[20], [22]], 0)
    ordinary = type(vlm).forward

    def capped(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = ordinary(self, *args, **kwargs)
        output.logits = 0.05 * torch.tanh(output.logits / 0.05)
        return output

    monkeypatch.setattr(type(vlm), "forward", capped)
    assert not replay_is_exact(vlm, inputs, predicts)
    monkeypatch.setattr(vlm.config.get_text_config(decoder=True), "final_logit_softcapping", 0.05, raising=False)
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
