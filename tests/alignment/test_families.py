"""Config files as the hub has them: which family, which kind of text model, which place."""

from __future__ import annotations

from typing import Any

import pytest
from header_builders import decoder, headers, tower

from vlmgraft.alignment import FAMILIES, align
from vlmgraft.alignment.families import TEXT_TYPES, find_family, text_type
from vlmgraft.alignment.view import GROUPS, group_of

LLAMA = {"model_type": "llama"}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"model_type": "qwen2_vl", "hidden_size": 8, "vision_config": {}}, "qwen2"),
        ({"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}}, "qwen2"),
        ({"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text"}}, "qwen3_moe"),
        ({"model_type": "llava", "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5"}}, "llama"),
        ({"model_type": "llava_next", "text_config": {"model_type": "mistral"}}, "mistral"),
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "internlm2"}}, "llama"),
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2"}}, "qwen2"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "gemma3"),
        ({"model_type": "brand_new"}, None),
        ({}, None),
    ],
)
def test_kind_of_text_model(config: dict[str, Any], kind: str | None) -> None:
    assert text_type(config) == kind


def test_listed_names_are_unique_and_known() -> None:
    names = [name for family in FAMILIES for name in family.model_types]
    assert len(set(names)) == len(names)
    assert all(find_family({"model_type": family.model_types[0]}) is family for family in FAMILIES)
    assert all(family.text_type in (None, *TEXT_TYPES.values()) for family in FAMILIES)


@pytest.mark.parametrize(
    ("model_type", "body", "head"),
    [
        ("qwen2_5_vl", "model.", "lm_head"),
        ("qwen2_5_vl", "model.language_model.", "lm_head"),
        ("llava", "language_model.model.", "language_model.lm_head"),
        ("llava", "model.language_model.", "lm_head"),
        ("llava", "model.", "lm_head"),
    ],
)
def test_places_that_releases_have_used(model_type: str, body: str, head: str) -> None:
    """The original LLaVA repository keeps its vision tower under the text model's own prefix."""
    shapes = {**tower("model.vision_tower.vision_tower.encoder."), **decoder(body, head)}
    vlm = headers("vlm", shapes, {"model_type": model_type, "text_config": LLAMA})
    alignment = align(vlm, headers("donor", decoder("model.", "lm_head"), LLAMA), modules=["all", "embeddings", "head"])
    assert not alignment.notes
    assert {tensor.name for tensor in alignment.merged} == set(decoder(body, head))


@pytest.mark.parametrize(
    ("role", "group"),
    [
        ("layers.0.self_attn.q_proj.weight", "attention"),
        ("layers.0.self_attn.wqkv.weight", "attention"),
        ("layers.0.self_attn.q_proj.bias", "bias"),
        ("layers.0.self_attn.q_norm.weight", "norm"),
        ("layers.0.self_attn.rotary_emb.inv_freq", "other"),
        ("layers.0.mlp.gate_proj.weight", "mlp"),
        ("layers.0.mlp.experts.gate_up_proj", "mlp"),
        ("layers.0.mlp.gate.weight", "router"),
        ("layers.0.mlp.shared_expert_gate.weight", "router"),
        ("layers.0.post_attention_layernorm.weight", "norm"),
        ("norm.weight", "norm"),
        ("embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "head"),
    ],
)
def test_groups(role: str, group: str) -> None:
    assert group_of(role) == group and group in GROUPS
