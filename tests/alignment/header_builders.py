"""Checkpoints that exist only as headers: names, shapes and dtypes, no bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmgraft.alignment import Alignment
from vlmgraft.checkpoint.header import TensorInfo
from vlmgraft.checkpoint.index import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]
LLAMA = {"model_type": "llama"}
HIDDEN, FEED, VOCABULARY, KV = 8, 12, 20, 4


def headers(folder: str, shapes: Shapes, config: dict[str, Any], dtype: str = "BF16") -> Checkpoint:
    """A checkpoint with these tensors, in this order."""
    file = Path(f"/nowhere/{folder}/model.safetensors")
    tensors = {name: TensorInfo(name, dtype, tuple(shape), file, 0, 0) for name, shape in shapes.items()}
    return Checkpoint(file.parent, tensors, (file,), config)


def decoder(
    body: str, head: str | None, layers: int = 2, *, hidden: int = HIDDEN, bias: bool = False
) -> dict[str, Any]:
    """Names and shapes of a Llama-like decoder under a prefix, with Qwen2's biases when asked."""
    shapes: dict[str, tuple[int, ...]] = {f"{body}embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        inside = f"{body}layers.{layer}."
        for letter, rows in (("q", hidden), ("k", KV), ("v", KV)):
            shapes[f"{inside}self_attn.{letter}_proj.weight"] = (rows, hidden)
            if bias:
                shapes[f"{inside}self_attn.{letter}_proj.bias"] = (rows,)
        shapes[f"{inside}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{inside}mlp.gate_proj.weight"] = (FEED, hidden)
        shapes[f"{inside}mlp.up_proj.weight"] = (FEED, hidden)
        shapes[f"{inside}mlp.down_proj.weight"] = (hidden, FEED)
        shapes[f"{inside}input_layernorm.weight"] = (hidden,)
        shapes[f"{inside}post_attention_layernorm.weight"] = (hidden,)
    shapes[f"{body}norm.weight"] = (hidden,)
    if head:
        shapes[f"{head}.weight"] = (VOCABULARY, hidden)
    return shapes


def tower(prefix: str = "vision_tower.encoder.", layers: int = 2, hidden: int = 6) -> dict[str, Any]:
    """A vision tower whose layers have the same suffixes as the decoder's."""
    return {
        f"{prefix}layers.{layer}.self_attn.{letter}_proj.weight": (hidden, hidden)
        for layer in range(layers)
        for letter in "qkvo"
    }


def qwen_vlm(folder: str = "vlm", **options: Any) -> Checkpoint:
    """A Qwen2.5-VL: a text model's own names, and `visual.*`."""
    shapes = {
        "visual.merger.mlp.0.weight": (6, 6),
        **decoder("model.", "lm_head", bias=True),
        **options.pop("more", {}),
    }
    return headers(folder, shapes, {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}})


def qwen(
    folder: str = "donor", *, layers: int = 2, hidden: int = HIDDEN, bias: bool = True, dtype: str = "BF16"
) -> Checkpoint:
    """A Qwen2 text model."""
    return headers(
        folder, decoder("model.", "lm_head", layers, hidden=hidden, bias=bias), {"model_type": "qwen2"}, dtype
    )


def verdicts(alignment: Alignment) -> dict[str, str]:
    return {tensor.name: tensor.verdict for tensor in alignment.tensors}


def reason(alignment: Alignment, name: str) -> str:
    return next(tensor.reason for tensor in alignment.tensors if tensor.name == name)


def without(checkpoint: Checkpoint, *names: str, **config: Any) -> Checkpoint:
    kept = {name: info for name, info in checkpoint.tensors.items() if name not in names}
    return dataclasses.replace(checkpoint, tensors=kept, config={**checkpoint.config, **config})
