"""Shares of attention on visual tokens against transformers' own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlmgraft.analysis.eval_data import as_questions
from vlmgraft.analysis.visual_attention import visual_attention
from vlmgraft.errors import DataError
from vlmgraft.evaluation.readers import load_suite
from vlmgraft.hf.batches import Question, encode
from vlmgraft.hf.models import load_processor, load_vlm


@pytest.fixture(scope="module")
def lab(trio: Path) -> tuple[Any, Any]:
    return load_vlm(trio / "vlm", "float32"), load_processor(trio / "vlm")


@pytest.fixture(scope="module")
def prompts(lab: tuple[Any, Any]) -> list[Question]:
    return as_questions(load_suite("lab", split="calibration", limit=8))[::2]


def test_shares_are_those_of_transformers_weights(trio: Path, lab: tuple[Any, Any], prompts: list[Question]) -> None:
    """Summed token by token over the weights that `output_attentions` gives."""
    model, processor = lab
    plain = load_vlm(trio / "vlm", "float32")
    plain.set_attn_implementation("eager")
    sums, count = torch.zeros(4), 0
    for question in prompts:
        batch = encode(processor, [question])
        with torch.no_grad():
            layers = plain(**batch, output_attentions=True).attentions
        ids = batch["input_ids"][0].tolist()
        visual = [place for place, token in enumerate(ids) if token == model.config.image_token_id]
        for place in range(visual[0], len(ids)):
            if place not in visual:
                count += 1
                sums += torch.stack([weights[0, :, place, visual].sum(-1).mean() for weights in layers])
    found = visual_attention(model, processor, prompts, batch_size=3)
    assert found == pytest.approx((sums / count).tolist(), abs=1e-5)
    assert all(0 < share < 1 for share in found)


def test_the_model_is_left_as_it_was(lab: tuple[Any, Any], prompts: list[Question]) -> None:
    model, processor = lab
    hooks = [len(layer.self_attn._forward_hooks) for layer in model.model.language_model.layers]
    before = model.config.get_text_config(decoder=True)._attn_implementation
    broken = Question(prompts[0].question, (object(),))  # type: ignore[arg-type]
    visual_attention(model, processor, prompts[:1])
    with pytest.raises((DataError, TypeError, ValueError, AttributeError)):
        visual_attention(model, processor, [broken])
    assert model.config.get_text_config(decoder=True)._attn_implementation == before != "eager"
    assert [len(layer.self_attn._forward_hooks) for layer in model.model.language_model.layers] == hooks


def test_questions_without_images_are_refused(lab: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="image"):
        visual_attention(*lab, [Question("what is 1 + 1 ?")])


def test_a_small_model_is_looked_into_with_one_thread(
    lab: tuple[Any, Any], prompts: list[Question], threads_seen: list[int]
) -> None:
    visual_attention(*lab, prompts)
    assert set(threads_seen) == {1}
