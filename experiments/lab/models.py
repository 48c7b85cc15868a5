"""The lab's three models and their tokenizer and processor, as ordinary transformers folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from experiments.lab.tasks import vocabulary
from vlmgraft.lab.world import CELLS, TILE

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|im_start|> {{ message.role }} "
    "{%- if message.content is string -%}{{ ' ' + message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ ' <|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else -%}{{ ' ' + part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ ' <|im_end|> ' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|> assistant ' }}{%- endif -%}"
)

TEXT_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,  # the defaults of the two classes differ
    "tie_word_embeddings": False,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; the special tokens carry Qwen's names."""
    words = vocabulary()
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [word for word in words if word.startswith("<") and "think" not in word and word != "<unk>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=[word for word in special if word not in ("<pad>", "<|im_end|>")],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=256,
    )


def build_processor() -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor at patch 8, merge 2: a 128×16 image becomes a row of eight visual tokens."""
    size = {"shortest_edge": TILE * TILE, "longest_edge": 4 * 2 * CELLS * TILE * TILE}
    images = Qwen2VLImageProcessor(size=size, patch_size=8, merge_size=2)
    videos = Qwen2VLVideoProcessor(size=size, patch_size=8, merge_size=2)
    return Qwen2_5_VLProcessor(images, build_tokenizer(), videos, chat_template=CHAT_TEMPLATE)


def _token_ids() -> dict[str, int | None]:
    words = vocabulary()
    return {"bos_token_id": None, "eos_token_id": words.index("<|im_end|>"), "pad_token_id": words.index("<pad>")}


def build_text_model(seed: int) -> Qwen2ForCausalLM:
    """A fresh base LLM: hidden 128, 4 layers, feed-forward 256, about 0.6 M parameters, float32."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=len(vocabulary()), **TEXT_SHAPE, **_token_ids()))


def build_vlm(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A fresh VLM: a tower of width 64 and depth 2 on the same text model.

    `mrope_section` gives every rotary frequency to the width axis, so a one-row image is positioned like text.
    """
    words = vocabulary()
    text = TEXT_SHAPE | {"vocab_size": len(words), "rope_parameters": _mrope()} | _token_ids()
    vision: dict[str, Any] = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 8}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": TEXT_SHAPE["hidden_size"]}
    vision |= {"window_size": 128, "fullatt_block_indexes": [0, 1]}
    marks = {f"{name}_token_id": words.index(f"<|{mark}|>") for name, mark in _MARKS.items()}
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **marks)
    return Qwen2_5_VLForConditionalGeneration(config)


_MARKS = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}


def _mrope() -> dict[str, Any]:
    half_head = TEXT_SHAPE["hidden_size"] // TEXT_SHAPE["num_attention_heads"] // 2
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [0, 0, half_head]}


def save(model: Any, folder: Path, processor: Qwen2_5_VLProcessor | None = None) -> None:
    """Save a bf16 copy of the model with its tokenizer (and processor) to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    float32 = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(torch.float32).load_state_dict(float32)
    (processor or build_tokenizer()).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
