"""A checkpoint as a text model: roles, groups, parts of fused tensors, and what only images use."""

from __future__ import annotations

from typing import Any

import pytest
from header_builders import decoder, headers, qwen, qwen_vlm, without

from vlmgraft.alignment.layouts import Form
from vlmgraft.alignment.view import GROUPS, VISION, group_of, text_view
from vlmgraft.errors import AlignmentError


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


def test_a_tensor_has_the_role_that_llama_gives_it() -> None:
    """InternLM2's names become Llama's; the tower is no part of it."""
    shapes = {
        "vision_model.layers.0.attn.weight": (6, 6),
        "language_model.model.tok_embeddings.weight": (20, 8),
        "language_model.model.layers.0.attention.wo.weight": (8, 8),
        "language_model.model.layers.0.feed_forward.w2.weight": (8, 12),
        "language_model.model.norm.weight": (8,),
        "language_model.output.weight": (20, 8),
    }
    view = text_view(headers("vlm", shapes, {"model_type": "internvl_chat", "llm_config": {"model_type": "internlm2"}}))
    assert {held.name.removeprefix("language_model."): (held.role, held.layer) for held in view.held.values()} == {
        "model.tok_embeddings.weight": ("embed_tokens.weight", None),
        "model.layers.0.attention.wo.weight": ("layers.0.self_attn.o_proj.weight", 0),
        "model.layers.0.feed_forward.w2.weight": ("layers.0.mlp.down_proj.weight", 0),
        "model.norm.weight": ("norm.weight", None),
        "output.weight": ("lm_head.weight", None),
    }
    assert (view.layers, view.text_type) == (1, "llama")


def fused(**more: tuple[int, ...]) -> dict[str, Any]:
    """One layer whose attention and experts are stored in few tensors."""
    inside = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (20, 8), f"{inside}self_attn.wqkv.weight": (16, 8)}
    shapes |= {f"{inside}mlp.experts.gate_up_proj": (3, 24, 8), f"{inside}mlp.experts.down_proj": (3, 8, 12)}
    return {**shapes, **{f"{inside}{name.replace('__', '.')}": shape for name, shape in more.items()}}


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_fused_tensors_list_their_parts() -> None:
    """16 rows are 4 query heads and 2 × 2 others, of 2 rows each; 3 experts have a gate and an up each."""
    view = text_view(headers("vlm", fused(), HEADS))
    wqkv, position = view.parts["layers.0.self_attn.k_proj.weight"]
    assert (wqkv.form, position) == (Form("wqkv", heads=(2, 2, 2)), 1)
    assert wqkv.parts == tuple(f"layers.0.self_attn.{letter}_proj.weight" for letter in "qkv")
    experts, position = view.parts["layers.0.mlp.experts.1.up_proj.weight"]
    assert (experts.form, position) == (Form("gate_up", count=3, transposed=False), 3)
    turned = fused(mlp__experts__gate_up_proj=(3, 8, 24), mlp__experts__down_proj=(3, 12, 8))
    down, position = text_view(headers("vlm", turned, HEADS)).parts["layers.0.mlp.experts.2.down_proj.weight"]
    assert (down.form, position) == (Form("down", count=3, transposed=True), 2)


@pytest.mark.parametrize(
    ("shapes", "config", "said"),
    [
        (fused(), {}, "config.json must give num_attention_heads"),
        (fused(), {"num_attention_heads": 3, "num_key_value_heads": 2}, "16 rows do not divide into 3 query and 2 × 2"),
        (fused(mlp__experts__down_proj=(3, 7, 12)), HEADS, "do not pair as gate_up_proj and down_proj"),
        (fused(mlp__experts__down_proj=(10_001, 8, 12)), HEADS, "has 10001 experts; at most 10000"),
    ],
)
def test_fused_tensors_that_do_not_come_apart_are_refused(
    shapes: dict[str, Any], config: dict[str, Any], said: str
) -> None:
    with pytest.raises(AlignmentError, match=said):
        text_view(headers("vlm", shapes, config))


def test_layers_that_only_images_use_are_counted_out() -> None:
    """Layer 1 of three is cross-attention: the third on disk is the second of the text model."""
    view = text_view(headers("vlm", decoder("model.", "lm_head", 3), {"cross_attention_layers": [1]}))
    assert view.layers == 2
    assert view.held["model.layers.2.mlp.up_proj.weight"].role == "layers.1.mlp.up_proj.weight"
    other = view.held["model.layers.1.mlp.up_proj.weight"]
    assert other.role == f"{VISION}1.mlp.up_proj.weight" and other.layer is None


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"architectures": ["Qwen2ForCausalLM"]}, True),
        ({"architectures": ["Qwen2Model"]}, False),
        ({}, True),
    ],
)
def test_a_head_that_is_not_on_disk_is_tied_or_missing(config: dict[str, Any], tied: bool) -> None:
    headless = headers(
        "vlm", {name: info.shape for name, info in without(qwen(), "lm_head.weight").tensors.items()}, config
    )
    assert text_view(headless).tied is tied


def test_missing_layers_are_named() -> None:
    absent = [name for name in qwen_vlm().tensors if ".layers.0." in name]
    with pytest.raises(AlignmentError, match=r"layers \[0\] are missing under model\.layers\., which go up to 1"):
        text_view(without(qwen_vlm(), *absent))
