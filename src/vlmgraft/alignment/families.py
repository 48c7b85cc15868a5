"""The language model in a config: its section, its type, and one name for each role.

The place of a language model in a checkpoint is found from its config and its tensors (`alignment/places.py`). The
tables here hold what neither tells: types of text models that share an architecture, and other names for Llama's roles.
Names are those in the files (`save_pretrained` of transformers writes the hub's names), not those of `state_dict()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where a language model is on disk. `body` is the name prefix of its embeddings and norms, `body + stack` the
    prefix of a layer's number, `head` the head's name without `.weight`, `embed` that of the token embeddings."""

    body: str
    head: str
    stack: str = "layers."
    embed: str = "embed_tokens"


TEXT_TYPES: dict[str, str] = {
    **{kind: kind for kind in ("llama", "mistral", "ministral3", "mixtral", "phi3")},
    **{kind: kind for kind in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "granite")},
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_5_omni_text"), "qwen2"),
    **dict.fromkeys(("llava_onevision", "llava_qwen", "llava_qwen2", "internvl"), "qwen2"),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_text"), "qwen3"),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_omni_moe_text"), "qwen3_moe"),
    **dict.fromkeys(("llava", "llava_next", "llava_llama", "idefics3", "smolvlm", "internlm2", "vicuna"), "llama"),
    **dict.fromkeys(("llava_mistral", "idefics2", "mistral3"), "mistral"),
    "paligemma": "gemma",
    "gemma3_text": "gemma3",
    **dict.fromkeys(("mllama", "mllama_text_model"), "llama"),
    **dict.fromkeys(("phi4mm", "phi4_multimodal"), "phi3"),
    **dict.fromkeys(("deepseek_v3", "kimi_k2"), "deepseek_v3"),
    "paddleocr_vl_text": "ernie4_5",
    "molmo2_text": "qwen3",
    "granite4_vision_text": "granite",
}
"""The type of text model behind a `model_type`: a text section's, or that of a VLM whose config omits its text model's
(the default of its class in transformers). InternLM2 is Llama with q, k and v fused (`alignment/layouts.py`)."""

RENAMES: tuple[tuple[str, str], ...] = (
    (".base_layer.", "."),
    ("attention.wqkv.", "self_attn.wqkv."),
    ("attention.wo.", "self_attn.o_proj."),
    ("block_sparse_moe.", "mlp."),
    ("feed_forward.", "mlp."),
    (".w1.", ".gate_proj."),
    (".w2.", ".down_proj."),
    (".w3.", ".up_proj."),
    ("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
    *((f"{name}norm.", "input_layernorm.") for name in ("attention_", "attn_")),
    *((f"{name}norm.", "post_attention_layernorm.") for name in ("ffn_", "ff_")),
    ("self_attn.attn_out.", "self_attn.o_proj."),
    ("mlp.ff_out.", "mlp.down_proj."),
    ("ln_f.", "norm."),
    *((f"self_attn.to_{letter}.", f"self_attn.{letter}_proj.") for letter in "qkv"),
    ("self_attn.to_out.", "self_attn.o_proj."),
    ("self_attn.norm_q.", "self_attn.q_norm."),
    ("self_attn.norm_k.", "self_attn.k_norm."),
)
"""Other names (PEFT, InternLM2, Mixtral, LFM2, Llama 4, Molmo2, …) and Llama's, which are this package's roles."""


@lru_cache(maxsize=1 << 14)  # layers repeat each other, and a mixture of experts has 50,000 tensors
def renamed(inside: str) -> str:
    """The role of a tensor inside a decoder layer: its name in Llama."""
    for theirs, ours in RENAMES:
        inside = inside.replace(theirs, ours)
    return inside


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model; the whole of it for text models and flat configs."""
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        if isinstance(config.get(key), dict):
            return text_config(config[key])
    return config


def has_tower(config: dict[str, Any]) -> bool:
    """Whether a config.json mentions a vision tower."""
    return any("vision" in key or key == "vq_config" for key, value in config.items() if value)


def text_type(config: dict[str, Any]) -> str | None:
    """The type of language model that a config.json describes ("qwen2", "llama", …); None if it names none."""
    inner = text_config(config)
    named = inner.get("model_type") if inner is not config else None
    kind = str(named or config.get("model_type"))
    return TEXT_TYPES.get(kind) or (str(named) if named else _flat_type(config))


def same_kind(one: str, other: str) -> bool:
    """Whether two types may be one architecture: equal, or not both in `TEXT_TYPES` and equal without vision suffix."""
    listed = TEXT_TYPES.values()
    return one == other or (not (one in listed and other in listed) and _stem(one) == _stem(other))


def _flat_type(config: dict[str, Any]) -> str | None:
    return None if has_tower(config) else config.get("model_type")


def _stem(kind: str) -> str:
    """A type without its vision suffix: `glm4` for glm4v_text, `hunyuan` for hunyuan_vl_text. Version digits stay."""
    first = kind.split("_")[0]
    return first[:-1] if first.endswith("v") and first[-2:-1].isdigit() else first
