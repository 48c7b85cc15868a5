"""Where each VLM family keeps its language model on disk, and which text models it accepts: data, not code.

The names are those of the files (`save_pretrained` of transformers writes the hub's names back), not those of
`state_dict()`. A place is a prefix in front of `layers.N.` and the name of the head; a family lists the places its
releases have used, the usual one first, and the first one whose `layers.0.` exists in the file is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """`body` stands before `layers.N.`, `embed_tokens.` and `norm.`; `head` is the head's name without `.weight`."""

    body: str
    head: str


@dataclass(frozen=True)
class Family:
    """One VLM family: `model_types` as config.json spells them; `text_type` where the config does not name one."""

    name: str
    model_types: tuple[str, ...]
    places: tuple[Place, ...]
    text_type: str | None = None


BARE = Place("model.", "lm_head")
NESTED = Place("model.language_model.", "lm_head")
WRAPPED = Place("language_model.model.", "language_model.lm_head")
TEXT_MODEL = Place("model.text_model.", "lm_head")
HEADLESS = Place("", "lm_head")

FAMILIES: tuple[Family, ...] = (
    Family("qwen2_vl", ("qwen2_vl",), (BARE, NESTED, WRAPPED), "qwen2"),
    Family("qwen2_5_vl", ("qwen2_5_vl",), (BARE, NESTED, WRAPPED), "qwen2"),
    Family("qwen3_vl", ("qwen3_vl",), (NESTED, BARE), "qwen3"),
    Family("qwen3_vl_moe", ("qwen3_vl_moe",), (NESTED, BARE), "qwen3_moe"),
    Family("llava", ("llava", "llava_llama", "llava_mistral", "llava_qwen"), (WRAPPED, NESTED, BARE), "llama"),
    Family("llava_next", ("llava_next",), (WRAPPED, NESTED), "llama"),
    Family("llava_onevision", ("llava_onevision",), (WRAPPED, NESTED), "qwen2"),
    Family("idefics2", ("idefics2",), (TEXT_MODEL,), "mistral"),
    Family("idefics3", ("idefics3",), (TEXT_MODEL,), "llama"),
    Family("smolvlm", ("smolvlm",), (TEXT_MODEL,), "llama"),
    Family("internvl", ("internvl",), (WRAPPED, NESTED), "qwen2"),
    Family("internvl_chat", ("internvl_chat",), (WRAPPED, Place("language_model.model.", "language_model.output"))),
    Family("gemma3", ("gemma3",), (WRAPPED, NESTED), "gemma3"),
    Family("paligemma", ("paligemma",), (WRAPPED, NESTED), "gemma"),
    Family("mistral3", ("mistral3",), (WRAPPED, NESTED), "mistral"),
)

TEXT_PLACES: tuple[Place, ...] = (BARE, Place("model.", "output"), HEADLESS)
"""Where a text model keeps its layers: `…ForCausalLM` (Llama and InternLM2 names), then a bare `…Model`."""

TEXT_TYPES: dict[str, str] = {
    **{kind: kind for kind in ("llama", "mistral", "ministral3", "mixtral", "phi3")},
    **{kind: kind for kind in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "granite")},
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "gemma3_text": "gemma3",
    "internlm2": "llama",
    "vicuna": "llama",
}
"""The kind of text model behind a `model_type`. Donor and VLM must be of one kind; a type that is not listed is paired
by names and shapes alone. InternLM2 is Llama with q, k and v fused (`alignment/layouts.py` takes them apart)."""

RENAMES: tuple[tuple[str, str], ...] = (
    ("attention.wqkv.", "self_attn.wqkv."),
    ("attention.wo.", "self_attn.o_proj."),
    ("feed_forward.w1.", "mlp.gate_proj."),
    ("feed_forward.w2.", "mlp.down_proj."),
    ("feed_forward.w3.", "mlp.up_proj."),
    ("attention_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("tok_embeddings.", "embed_tokens."),
)
"""InternLM2's names and Llama's, which this package uses as roles."""


def find_family(config: dict[str, Any]) -> Family | None:
    """The listed family of a config.json, by its `model_type`; None when it is not listed."""
    model_type = config.get("model_type")
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model; the whole of it for text models and flat configs."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            return config[key]
    return config


def text_type(config: dict[str, Any]) -> str | None:
    """The kind of language model a config.json describes ("qwen2", "llama", …), or None when it is not a listed one."""
    inner = text_config(config)
    kind = TEXT_TYPES.get(str(inner.get("model_type")))
    family = find_family(config)
    return family.text_type if kind is None and family is not None else kind
