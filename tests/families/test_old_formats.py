"""Checkpoints that their own repositories wrote: as VLM and as donor, with everything of the text model merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

from vlmgraft.pipeline import merge

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 40, "tie_word_embeddings": False}  # fmt: skip
TOWER = {
    "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight": (16, 3, 4, 4),
    "model.mm_projector.0.weight": (16, 16),
    "model.mm_projector.2.weight": (16, 16),
    "model.image_newline": (16,),
}
OLD = {"mm_vision_tower": "openai/clip-vit-large-patch14", "mm_projector_type": "mlp2x_gelu"}
SPEECH_AND_PICTURES = {
    "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.embed_tokens_extend.audio_embed.encoder.encoders.0.feed_forward_in.net.0.linear.weight": (16, 16),
    **{
        f"model.layers.{layer}.{module}.lora_{side}.{kind}.weight": (4, 16)
        for layer in range(2)
        for module in ("self_attn.qkv_proj", "mlp.down_proj")
        for side in "AB"
        for kind in ("vision", "speech")
    },
}
KIMI = {
    "vision_tower.encoder.blocks.0.wqkv.weight": (48, 16),
    "vision_tower.patch_embed.proj.weight": (16, 3, 4, 4),
    "mm_projector.linear_1.weight": (16, 16),
}


def as_it_is(name: str) -> str:
    return name


def phi4(name: str) -> str:
    return name.replace("_proj.weight", "_proj.base_layer.weight")


def inside(name: str) -> str:
    return f"language_model.{name}"


FORMATS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]], Callable[[str], str]]] = {
    "llava_mistral": ("Mistral", OLD, TOWER, as_it_is),
    "llava_qwen": ("Qwen2", OLD, TOWER, as_it_is),
    "llava_qwen2": ("Qwen2", OLD, TOWER, as_it_is),
    "llava_qwen3": ("Qwen3", OLD, TOWER, as_it_is),
    "llava_llama": ("Llama", OLD, TOWER, as_it_is),
    "llava": (
        "Llama",
        OLD,
        {k: v for k, v in TOWER.items() if "projector" in k},
        as_it_is,
    ),  # v1.5: the tower is CLIP's
    "phi4mm": ("Phi3", {"vision_lora": {"r": 4}, "embd_layer": {}, "img_processor": None}, SPEECH_AND_PICTURES, phi4),
    "kimi_k25": ("DeepseekV3", {"text_config": {"model_type": "kimi_k2", **SIZES}, "vision_config": {}}, KIMI, inside),
}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8,
           "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
           "qk_nope_head_dim": 4, "v_head_dim": 4, "num_key_value_heads": 4}  # fmt: skip


def text_model(folder: Path, name: str, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    sizes = {**SIZES, **(EXPERTS if name == "DeepseekV3" else {})}
    extra = {"head_dim": 4} if name in ("Qwen3", "Mistral") else {"pad_token_id": 0} if name == "Phi3" else {}
    model = getattr(T, f"{name}ForCausalLM")(getattr(T, f"{name}Config")(**sizes, **extra))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def in_old_format(folder: Path, kind: str, text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text model's weights under a format's names, with its tower; the config as such files have it."""
    _, config, tower, named = FORMATS[kind]
    torch.manual_seed(7)
    weights = {named(key): tensor.clone() for key, tensor in text.items()}
    weights |= {key: torch.randn(shape) for key, shape in tower.items()}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    flat = {} if "text_config" in config else SIZES
    written = {"model_type": kind, "architectures": [f"{kind}ForCausalLM"], **flat, **config}
    (folder / "config.json").write_text(json.dumps(written))
    return weights


@pytest.mark.parametrize("donor_kind", ["text", "itself"])
@pytest.mark.parametrize("kind", FORMATS)
def test_merged_as_the_formula_says(kind: str, donor_kind: str, tmp_path: Path) -> None:
    name, _, tower, named = FORMATS[kind]
    base, donor, own = (
        text_model(tmp_path / f"{who}-text", name, seed) for seed, who in enumerate(("base", "donor", "own"))
    )
    before = in_old_format(tmp_path / "vlm", kind, own)
    for who, weights in (("base", base), ("donor", donor)):
        in_old_format(tmp_path / who, kind, weights)
    suffix = "-text" if donor_kind == "text" else ""
    recipe = {"vlm": str(tmp_path / "vlm"), "donor": str(tmp_path / f"donor{suffix}"),
              "donor_base": str(tmp_path / f"base{suffix}"), "modules": ["all", "embeddings", "head"],
              "method": {"name": "task_arithmetic", "scale": 0.5}}  # fmt: skip
    merge(recipe, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys()
    for key in tower:
        assert torch.equal(after[key], before[key]), key
    for key, tensor in own.items():
        assert torch.allclose(after[named(key)], tensor + 0.5 * (donor[key] - base[key]), atol=1e-5), key
