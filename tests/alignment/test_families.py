"""Config files as the hub has them: which family, which kind of text model, which place."""

from __future__ import annotations

from typing import Any

import pytest
from header_builders import decoder, headers, tower

from vlmgraft.alignment import align
from vlmgraft.alignment.families import same_kind, text_type
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
        ({"model_type": "brand_new", "vision_config": {"depth": 2}}, None),
        ({"model_type": "cohere2"}, "cohere2"),
        ({}, None),
    ],
)
def test_kind_of_text_model(config: dict[str, Any], kind: str | None) -> None:
    assert text_type(config) == kind


@pytest.mark.parametrize(
    ("vlm", "donor", "same"),
    [
        ("qwen2", "qwen2", True),
        ("glm4v_moe_text", "glm4_moe", True),
        ("hunyuan_vl_text", "hunyuan_v1_dense", True),
        ("glm4v_text", "glm", False),
        ("cohere2", "cohere", False),
        ("granite", "llama", False),
        ("emu3_text_model", "mistral", False),
        ("qwen3", "qwen3_moe", False),
    ],
)
def test_kinds_of_one_name_are_one_architecture(vlm: str, donor: str, same: bool) -> None:
    assert same_kind(vlm, donor) is same is same_kind(donor, vlm)


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
    assert [note[:45] for note in alignment.notes] == ["not every checkpoint has a tokenizer.json: wh"]
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
    assert group_of(role, (1, 8) if "gate.weight" in role else (8, 8)) == group and group in GROUPS
