"""Tiny checkpoints of every family, made by transformers (InternVL's original names: by renaming such a one).

Sizes are the smallest that keep q, k and v of different shapes. Donor and VLM are both near their base, as tuned models
are, so that cancellation errors would show.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as T
from internlm import to_internlm, to_internvl_chat
from safetensors.torch import load_file, save_file

HIDDEN, FEED, EXPERT_FEED, EXPERTS, VOCABULARY = 16, 24, 6, 3, 64
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FEED,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTED = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_FEED}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [0, 1, 1]}}
TOWER = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {**TOWER, "image_size": 16, "patch_size": 8}
QWEN_TOWER = {"depth": 2, "hidden_size": 8, "out_hidden_size": HIDDEN, "num_heads": 2, "patch_size": 8}
DEEP = {**QWEN_TOWER, "intermediate_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
PERCEIVER = {"hidden_size": HIDDEN, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2}

DONORS: dict[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig"),
    "mistral": ("MistralForCausalLM", "MistralConfig"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig"),
}


@dataclass(frozen=True)
class Case:
    """How to make one VLM and what its donors are. `after` rewrites a saved folder, by role ("vlm", "donor", …)."""

    family: str
    vlm: str
    config: Mapping[str, Any]
    text: str
    text_changes: Mapping[str, Any] = field(default_factory=dict)
    donor_changes: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    donor_dtype: torch.dtype = torch.bfloat16

    @property
    def loadable(self) -> bool:
        """Whether transformers has a class that reads the VLM as it is on disk."""
        return "vlm" not in self.after or self.family == "qwen3_vl_moe"


@dataclass(frozen=True)
class Trio:
    """Folders of one case; `plain` holds the same four as transformers saved them, before `after`."""

    case: Case
    vlm: Path
    donor: Path
    donor_base: Path
    vlm_base: Path
    plain: Path

    def in_vlm(self, role: str) -> dict[str, torch.Tensor]:
        """The text model `role` in the VLM's place: float32, by the VLM's names on disk, put there by transformers.

        Independent of `vlmgraft.alignment`. Vocabulary rows that the text model does not have stay the VLM's.
        """
        folder = self.plain.parent / f"{role}_in_vlm"
        if folder.exists():
            return load_file(folder / "model.safetensors")
        model = T.AutoModelForImageTextToText.from_pretrained(self.plain / "vlm", dtype=torch.float32)
        theirs = text_model(self.plain / role)
        with torch.no_grad():
            for name, parameter in text_parameters(model).items():
                rows = min(len(parameter), len(theirs[name]))
                parameter[:rows] = theirs[name][:rows].to(parameter.dtype)
        model.save_pretrained(folder)
        self.case.after.get("vlm", lambda folder: None)(folder)
        return load_file(folder / "model.safetensors")


def transpose_experts(folder: Path) -> None:
    """Turn the fused experts to the hub's orientation, [experts, in, out]."""
    tensors = load_file(folder / "model.safetensors")
    turned = {k: v.transpose(1, 2).contiguous() if ".mlp.experts." in k else v for k, v in tensors.items()}
    save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})


def llava(name: str, kind: str, tower: str = "clip_vision_model", **changes: Any) -> Case:
    """A case of the LLaVA classes: any text model behind one of their towers."""
    vision = {**CLIP, "model_type": tower, **({"projection_dim": 8} if "clip" in tower else {})}
    config = {"vision_config": vision, "image_token_index": 5, "vision_feature_layer": -1, "text_type": kind}
    if name != "Llava":
        config["image_grid_pinpoints"] = [[16, 16]]
    family = {"Llava": "llava", "LlavaNext": "llava_next", "LlavaOnevision": "llava_onevision"}[name]
    return Case(family, name, config, kind, **changes)


def internvl(kind: str, family: str = "internvl", **changes: Any) -> Case:
    """A case of InternVL: 3 as transformers saves it, or the original names by `after`."""
    vision = {**CLIP, "image_size": [16, 16], "patch_size": [8, 8]}
    config = {"vision_config": vision, "image_token_index": 5, "text_type": kind, "tie_word_embeddings": False}
    return Case(family, "InternVL", {**config, "image_token_id": 5}, kind, **changes)


IDEFICS = {"vision_config": CLIP, "image_token_id": 5, "pad_token_id": 0}
INTERNLM = {"donor": to_internlm, "donor_base": to_internlm, "vlm_base": to_internlm}

CASES: dict[str, Case] = {
    "qwen2_vl": Case(
        "qwen2_vl", "Qwen2VL", {"vision_config": {**QWEN_TOWER, "embed_dim": 8, "hidden_size": 16}}, "qwen2", MROPE
    ),
    "qwen2_vl_tied": Case(
        "qwen2_vl",
        "Qwen2VL",
        {"vision_config": {**QWEN_TOWER, "embed_dim": 8, "hidden_size": 16}, "tie_word_embeddings": True},
        "qwen2",
        {**MROPE, "tie_word_embeddings": True},
        {"tie_word_embeddings": True},
    ),
    "qwen2_5_vl": Case(
        "qwen2_5_vl", "Qwen2_5_VL", {"vision_config": {**QWEN_TOWER, "intermediate_size": 16}}, "qwen2", MROPE
    ),
    "qwen2_5_vl_tied_f16_donor": Case(
        "qwen2_5_vl",
        "Qwen2_5_VL",
        {"vision_config": {**QWEN_TOWER, "intermediate_size": 16}},
        "qwen2",
        MROPE,
        {"tie_word_embeddings": True},
        donor_dtype=torch.float16,
    ),
    "qwen3_vl": Case("qwen3_vl", "Qwen3VL", {"vision_config": DEEP}, "qwen3", MROPE),
    "qwen3_vl_moe": Case(
        "qwen3_vl_moe", "Qwen3VLMoe", {"vision_config": DEEP}, "qwen3_moe", {**MROPE, **EXPERTED}, EXPERTED
    ),
    "qwen3_vl_moe_hub": Case(
        "qwen3_vl_moe",
        "Qwen3VLMoe",
        {"vision_config": DEEP},
        "qwen3_moe",
        {**MROPE, **EXPERTED},
        EXPERTED,
        after={"vlm": transpose_experts},
    ),
    "llava_llama": llava("Llava", "llama"),
    "llava_longer_vocabulary": llava("Llava", "llama", text_changes={"vocab_size": VOCABULARY + 4}),
    "llava_shorter_vocabulary": llava("Llava", "llama", text_changes={"vocab_size": VOCABULARY - 4}),
    "llava_next_mistral": llava("LlavaNext", "mistral"),
    "llava_next_qwen2": llava("LlavaNext", "qwen2"),
    "llava_onevision": llava("LlavaOnevision", "qwen2", "siglip_vision_model"),
    "idefics2": Case(
        "idefics2",
        "Idefics2",
        {
            **IDEFICS,
            "perceiver_config": {**PERCEIVER, "resampler_head_dim": 4, "num_key_value_heads": 1},
            "text_type": "mistral",
        },
        "mistral",
    ),
    "idefics3": Case("idefics3", "Idefics3", {**IDEFICS, "text_type": "llama"}, "llama"),
    "smolvlm": Case("smolvlm", "SmolVLM", {**IDEFICS, "text_type": "llama"}, "llama"),
    "internvl3": internvl("qwen2"),
    "internvl2_qwen2": internvl("qwen2", "internvl_chat", after={"vlm": lambda f: to_internvl_chat(f, fused=False)}),
    "internvl2_internlm2": internvl(
        "llama", "internvl_chat", after={"vlm": lambda f: to_internvl_chat(f, fused=True), **INTERNLM}
    ),
    "internvl2_llama_donor": internvl(
        "llama", "internvl_chat", after={"vlm": lambda f: to_internvl_chat(f, fused=True)}
    ),
    "internvl2_llama_names_internlm2_donor": internvl(
        "llama", "internvl_chat", after={"vlm": lambda f: to_internvl_chat(f, fused=False), **INTERNLM}
    ),
    "gemma3": Case(
        "gemma3",
        "Gemma3",
        {
            "vision_config": CLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
        "gemma3",
        {"sliding_window": 8},
        {"sliding_window": 8},
    ),
    "paligemma": Case(
        "paligemma",
        "PaliGemma",
        {
            "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
            "image_token_index": 5,
            "text_type": "gemma",
            "tie_word_embeddings": True,
        },
        "gemma",
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": True},
    ),
    "mistral3": Case(
        "mistral3",
        "Mistral3",
        {
            "vision_config": {**CLIP, "model_type": "pixtral", "head_dim": 4},
            "image_token_index": 5,
            "text_type": "mistral",
            "tie_word_embeddings": False,
        },
        "mistral",
    ),
}


def build(case: Case, root: Path) -> Trio:
    """Save the VLM, the donor and both bases of a case under `root`."""
    torch.manual_seed(0)
    config = dict(case.config)
    text = {**TEXT, **case.text_changes, **({"model_type": config.pop("text_type")} if "text_type" in config else {})}
    config.setdefault("tie_word_embeddings", False)
    vlm = getattr(T, f"{case.vlm}ForConditionalGeneration")(getattr(T, f"{case.vlm}Config")(text_config=text, **config))
    class_name, text_config = DONORS[case.text]
    base = getattr(T, class_name)(getattr(T, text_config)(**{**TEXT, **case.donor_changes}))
    plain = root / "plain"
    for name in ("vlm", "donor_base", "vlm_base", "donor"):
        model, dtype = (vlm, torch.bfloat16) if name == "vlm" else (base, case.donor_dtype)
        _spread(model, 0.2)
        model.to(dtype).save_pretrained(plain / name)
        shutil.copytree(plain / name, root / name)
        case.after.get(name, lambda folder: None)(root / name)
    return Trio(case, *(root / name for name in ("vlm", "donor", "donor_base", "vlm_base")), plain)


def _spread(model: torch.nn.Module, amount: float) -> None:
    """Add noise to every parameter, so that norms and biases differ from their constant start too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * torch.randn_like(parameter)


def text_parameters(model: Any) -> dict[str, torch.Tensor]:
    """Parameters of a model's language model and head, under the text model's own names."""
    inner = model.model
    body = getattr(inner, "language_model", None) or getattr(inner, "text_model", None) or inner
    return {**dict(body.named_parameters()), "lm_head.weight": model.lm_head.weight}


def text_model(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the language model in a folder, as transformers' modules have them.

    Independent of `vlmgraft.alignment`: it asks the loaded model for its language model and its head.
    """
    vision = "vision_config" in json.loads((folder / "config.json").read_text())
    auto = T.AutoModelForImageTextToText if vision else T.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype="auto")
    return {name: parameter.detach() for name, parameter in text_parameters(model).items()}
