"""Rewrites a folder with Llama's names into InternLM2's and InternVL2's original ones, written head by head.

This is the naive twin of the `wqkv` form in `vlmgraft.alignment.layouts`: it shares no code with it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}
TOWER = {"vision_tower": "vision_model", "multi_modal_projector": "mlp1"}


def fuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Rows of each key-value head in turn: its query heads, its key, its value."""
    size, rows = q.shape[0] // heads, []
    for head in range(kv_heads):
        for member in range(heads // kv_heads):
            start = (head * (heads // kv_heads) + member) * size
            rows.append(q[start : start + size])
        rows.append(k[head * size : (head + 1) * size])
        rows.append(v[head * size : (head + 1) * size])
    return torch.cat(rows)


def unfuse(fused: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `fuse`."""
    size, at = fused.shape[0] // (heads + 2 * kv_heads), 0
    parts: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
    for _ in range(kv_heads):
        for letter in ["q"] * (heads // kv_heads) + ["k", "v"]:
            parts[letter].append(fused[at : at + size])
            at += size
    q, k, v = (torch.cat(parts[letter]) for letter in "qkv")
    return q, k, v


def to_internlm(folder: Path) -> None:
    """Rewrite a Llama text model as InternLM2."""
    config = json.loads((folder / "config.json").read_text())
    _rewrite(folder, config["num_attention_heads"], config["num_key_value_heads"])
    config.update(model_type="internlm2", architectures=["InternLM2ForCausalLM"])
    (folder / "config.json").write_text(json.dumps(config))


def to_internvl_chat(folder: Path, *, fused: bool) -> None:
    """Rewrite an InternVL folder under the original names; the text model as InternLM2 when `fused`."""
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    if fused:
        _rewrite(folder, text["num_attention_heads"], text["num_key_value_heads"])
        text["model_type"] = "internlm2"
    tensors = load_file(folder / "model.safetensors")
    for old, new in TOWER.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.update(model_type="internvl_chat", llm_config=text, architectures=["InternVLChatModel"])
    (folder / "config.json").write_text(json.dumps(config))


def to_hf(folder: Path, out: Path, like: Path) -> None:
    """Write `folder` (original names) under transformers' names into `out`, with the config of `like`."""
    config = json.loads((like / "config.json").read_text())
    heads, kv_heads = (config["text_config"][f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    names = {new: old for old, new in {**NAMES, **TOWER}.items()}
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "attention.wqkv" in name:
            for letter, part in zip("qkv", unfuse(tensor, heads, kv_heads), strict=True):
                tensors[name.replace("attention.wqkv", f"self_attn.{letter}_proj")] = part
            continue
        text = name.startswith("language_model.")
        for new, old in names.items():
            if text or new in TOWER.values():
                name = re.sub(rf"\b{re.escape(new)}\b", old, name)
        tensors[name] = tensor
    out.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    (out / "config.json").write_text(json.dumps(config))


def _rewrite(folder: Path, heads: int, kv_heads: int) -> None:
    """Rename and fuse the text model's tensors in place."""
    tensors, written = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if name.startswith(("vision_tower.", "multi_modal_projector.")):
            written[name] = tensor
        elif ".self_attn.q_proj." in name:
            q, k, v = (tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv")
            written[name.replace("self_attn.q_proj", "attention.wqkv")] = fuse(q, k, v, heads, kv_heads)
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
            for old, new in NAMES.items():
                name = name.replace(f"{old}.weight", f"{new}.weight")
            written[name] = tensor
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
