"""Folders of a VLM, a donor and its base, small but with tensors of several chunks; and what a folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.index import open_checkpoint

Tensors = dict[str, Tensor]
KEYS = ("vlm", "donor", "donor_base")
SIDE = 300
EXPERTS, FEED = 3, 160


def decoder(rows: int = 40) -> Tensors:
    """One layer and its surroundings: matrices of 90,000 elements, a vocabulary of `rows`."""
    names = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"]
    names += [f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    weights = {name: torch.randn(SIDE, SIDE).bfloat16() for name in names}
    weights["model.embed_tokens.weight"] = torch.randn(rows, SIDE).bfloat16()
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        weights[f"model.{name}.weight"] = torch.randn(SIDE).bfloat16()
    return weights


def save(folder: Path, weights: Tensors, **config: Any) -> None:
    """A folder with one file of weights."""
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True, **config}))


def build(folder: Path, rows: int = 40, donor_rows: int = 40) -> None:
    """A Qwen2.5-VL-like VLM with `rows` words, donor and base of `donor_rows`."""
    torch.manual_seed(0)
    vlm = {**decoder(rows), "visual.blocks.0.weight": torch.randn(3, 3), "visual.empty": torch.zeros(0, 4)}
    save(folder / "vlm", vlm, model_type="qwen2_5_vl")
    for key in KEYS[1:]:
        save(folder / key, decoder(donor_rows), model_type="qwen2")


def build_experts(folder: Path) -> None:
    """A VLM with fused experts, donor and base with single ones, every projection of 48,000 elements."""
    torch.manual_seed(0)
    attention = [f"layers.0.self_attn.{x}_proj.weight" for x in "qkvo"]
    inside = "model.language_model."
    common = {"embed_tokens.weight": (40, SIDE), "norm.weight": (SIDE,), "layers.0.mlp.gate.weight": (EXPERTS, SIDE)}
    common.update(dict.fromkeys(attention, (SIDE, SIDE)))
    common.update({f"layers.0.{one}_layernorm.weight": (SIDE,) for one in ("input", "post_attention")})
    vlm = {inside + name: torch.randn(*shape).bfloat16() for name, shape in common.items()}
    vlm[f"{inside}layers.0.mlp.experts.gate_up_proj"] = torch.randn(EXPERTS, SIDE, 2 * FEED).bfloat16()
    vlm[f"{inside}layers.0.mlp.experts.down_proj"] = torch.randn(EXPERTS, FEED, SIDE).bfloat16()
    vlm["model.visual.blocks.0.weight"] = torch.randn(3, 3)
    save(folder / "vlm", vlm, model_type="qwen3_vl_moe", text_config={"model_type": "qwen3_vl_moe_text"})
    for key in KEYS[1:]:
        weights = {f"model.{name}": torch.randn(*shape).bfloat16() for name, shape in common.items()}
        for expert in range(EXPERTS):
            for half, shape in (("gate", (FEED, SIDE)), ("up", (FEED, SIDE)), ("down", (SIDE, FEED))):
                name = f"model.layers.0.mlp.experts.{expert}.{half}_proj.weight"
                weights[name] = torch.randn(*shape).bfloat16()
        save(folder / key, weights, model_type="qwen3_moe")


def aligned(folder: Path, **options: Any) -> Alignment:
    """The alignment of the three folders."""
    return align(*(open_checkpoint(folder / key) for key in KEYS), **options)


def tensors_in(folder: Path) -> Tensors:
    """All tensors of a folder, by the safetensors library."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def bytes_in(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the receipt, which holds seconds."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "receipt.json"}


def facts_in(folder: Path) -> list[dict[str, Any]]:
    """The receipt's rows."""
    rows: list[dict[str, Any]] = json.loads((folder / "receipt.json").read_text())["tensors"]
    return rows
