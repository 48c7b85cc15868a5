"""A tiny model of any class of the installed transformers: the default config with its sizes shrunk by name.

No list of classes is kept. Sizes of the text model differ from each other where they can, so that a mix-up shows.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import transformers as T
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VISION,
)

LAYERS = 4
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size(_per_layer_input)?|num_embeddings|.*vocab_size_base|split_ngram_parts", 80),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r"pad_token_id", 0),
    (r".*token_(id|index)|.*_id", 5),
    (r"first_k_dense_replace|moe_layer_start_index|num_nextn_predict_layers|num_mtp.*|mtp_.*layers", 1),
    (r"moe_layer_end_index", LAYERS - 1),
    (r"num_kv_shared_layers", 0),
    (r"(num_)?(hidden_|decoder_|encoder_)?layers|depth|num_hidden_layers|n_layers?|.*num_layers|num_.*_layers", LAYERS),
    (r"index_kpool", 2),
    (r"n_group|topk_group|num_expert_group|moe_num_shared_experts|n_shared_experts|num_shared_experts", 1),
    (r"(num|n)_(routed|local|expert)?_?experts|moe_num_experts|n_routed_experts|num_experts", 3),
    (r".*(experts_per_tok|top_?k.*|_k|topk)", 2),
    (r"moe_intermediate_size|expert_ffn_hidden_size|moe_ffn.*|.*expert_intermediate_size", 12),
    (
        r"(.*intermediate_size.*|ffn_dim|.*ffn_hidden_size|.*mlp_dim|.*feed_forward.*|encoder_ffn_dim|decoder_ffn_dim)",
        24,
    ),
    (
        r".*(num_key_value_heads|num_kv_heads|num_global_key_value_heads|linear_num_key_heads|mamba_n_groups|n_groups)",
        2,
    ),
    (r".*(attention_heads|num_heads|n_heads?|linear_num_value_heads|mamba_num_heads|mamba_n_heads|num_q_heads)", 4),
    (r".*(head_dim|head_size|d_head|mamba_head_dim|linear_key_head_dim|linear_value_head_dim)", 8),
    (r".*lora_rank", 8),
    (r"ssm_state_size|mamba_d_state|state_size", 8),
    (
        r".*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embed_dims|width|embedding_size|output_dim|projection_dim|codebook_dim|downsample_channels|output_channels|.*channels|ple_embed_dim|hc_lowrank)",
        32,
    ),
    (r"hidden_size_per_layer_input", 6),
    (r"in_channels|num_channels|input_channels", 3),
    (r"image_size|.*_resolution|.*img_size", 32),
    (r"max_position_embeddings|n_positions|max_.*positions", 64),
    (r"num_position_embeddings|position_embedding_size", 16),
    (r"num_queries|num_query_tokens|.*n_latents|num_latents|.*num_image_tokens", 4),
)


FILL: dict[str, Any] = {
    "head_dim": 8,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "vocabulary_map": {"<image>": 5, "IMGIMGBS10BS12A": 6, "<|extra_200|>": 7, "<|visual token 000001|>": 8},
    "deepstack_layer_map": [],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
"""What configs leave open and their classes need."""
MROPE = [2, 1, 1]
NOT_MADE = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)


def shrunk(value: Any, key: str = "", **changes: Any) -> Any:
    """A config's value with sizes made small; lists over layers cut to their last layers' kinds."""
    if key in changes and not isinstance(value, dict | bool):
        return changes[key]
    if key == "per_layer_config" and value:
        return {LAYERS - 1: shrunk(list(value.values())[-1], **changes)}
    if isinstance(value, dict):
        small = {name: shrunk(inner, str(name), **changes) for name, inner in value.items()}
        if "rope_type" in small and "mrope_section" in changes:
            small["mrope_section"] = MROPE
        if key == "rope_parameters" and not value and "mrope_section" in changes:
            return {
                kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
            }
        return small
    if key == "mrope_section":
        return MROPE
    if value is None:
        return FILL.get(key)
    if isinstance(value, bool | str | float):
        return value
    if isinstance(value, list):
        if len(value) > LAYERS and ("layer" in key or isinstance(value[0], str | float) or len(value) > 20):
            value = by_kind(value)
        return [shrunk(entry, key.removesuffix("s") if "layer" in key else key, **changes) for entry in value]
    if isinstance(value, int):
        if re.fullmatch(r"vision_feature_layer|.*_layer_ids?|.*indexe?s", key):
            return min(value, LAYERS - 1)
        for pattern, size in SIZES:
            if re.fullmatch(pattern, key):
                return min(value, size) if value > 0 else value
    return value


def by_kind(values: list[Any]) -> list[Any]:
    """`LAYERS` entries with every kind that the list has, in their order."""
    kinds = list(dict.fromkeys(map(str, values)))
    firsts = [next(value for value in values if str(value) == kind) for kind in kinds][:LAYERS]
    return (firsts * LAYERS)[:LAYERS]


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": 16},
    {"mrope_section": MROPE},
    {"num_key_value_heads": 4, "head_dim": 16, "adapter_in_dim": 32, "adapter_input_size": 32},
    {"hidden_size": 64, "downsample_rate": "2/4", "window_side": 2},
    {
        "architecture": "vit_pe_lang_large_patch14_448",
        "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": [32, 32]},
    },
    {"vocab_size": 270_000},
    {"num_experts": 3, "top_k_experts": 2, "moe_intermediate_size": 12},
)
"""Tried in turn: some classes want as many key as query heads, some rotary sections that they do not name."""


def tiny_config(model_type: str) -> Any:
    """The shrunk default config of a model type, the first variant of which its class can be made.

    Raises what transformers raised last.
    """
    default = CONFIG_MAPPING[model_type]()
    name = VISION.get(model_type) or CAUSAL[model_type]
    for number, changes in enumerate(VARIANTS):
        try:
            config = type(default).from_dict(shrunk(copy.deepcopy(default.to_dict()), **changes))
            with torch.device("meta"):
                getattr(T, name)(copy.deepcopy(config))
            return config
        except NOT_MADE:
            if number == len(VARIANTS) - 1:
                raise
    raise AssertionError("no variants")


LARGE = 20_000


def build(name: str, config: Any) -> Any:
    """A float32 model of a class on the CPU, every parameter random; only its weights are real, it cannot run.

    Parameters of `LARGE` elements and more (towers whose sizes no config gives) are cut to a corner.
    """
    with torch.device("meta"):
        model = getattr(T, name)(copy.deepcopy(config))
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                shape = parameter.shape if parameter.numel() < LARGE else [min(3, size) for size in parameter.shape]
                made[id(parameter)] = torch.nn.Parameter(torch.randn(shape))
            module._parameters[key] = made[id(parameter)]
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = torch.zeros(buffer.shape if buffer.numel() < LARGE else [2], dtype=buffer.dtype)
    return model
