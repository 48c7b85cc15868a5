"""A Qwen2.5-VL of made-up weights and prompts with one image each: what `gpu.py` answers with and trains gates of."""

from __future__ import annotations

from typing import Any

import torch

from vlmgraft.hf.modules import text_linears
from vlmgraft.spectral.factors import Factors

SIZES: dict[str, dict[str, int]] = {
    "7B": {"hidden": 3584, "inner": 18944, "layers": 28, "heads": 28, "keys": 4, "words": 152064, "prompt": 1000,
           "answer": 64, "batch": 8, "answered": 32, "rank": 64, "repeats": 3, "drift_layers": 2, "drift_steps": 6,
           "rows": 30, "columns": 32},
    "quick": {"hidden": 64, "inner": 128, "layers": 2, "heads": 4, "keys": 2, "words": 128, "prompt": 12, "answer": 4,
              "batch": 2, "answered": 3, "rank": 8, "repeats": 1, "drift_layers": 1, "drift_steps": 2,
              "rows": 2, "columns": 4},
}  # fmt: skip
"""Of the text model and what it reads; rows × columns are the tokens of the image in a prompt."""

TOWERS: dict[str, dict[str, Any]] = {
    "7B": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584,
           "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
    "quick": {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64,
              "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
}  # fmt: skip
"""The vision tower: of 7B as its config.json has it (windows of 4 × 4 tokens, and four blocks that see everything)."""

IMAGE, VIDEO, START, END, FIRST_WORD = 1, 2, 3, 4, 8
"""Token ids; words are those from `FIRST_WORD` on, 0 is padding."""


def model_of(size: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A Qwen2.5-VL of a size in `SIZES` and `TOWERS` with random weights, on the device."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    sizes = SIZES[size]
    text = {"hidden_size": sizes["hidden"], "intermediate_size": sizes["inner"], "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"], "num_key_value_heads": sizes["keys"], "vocab_size": sizes["words"],
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    half = sizes["hidden"] // sizes["heads"] // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=TOWERS[size], tie_word_embeddings=False, **ids)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval().requires_grad_(False)


def prompts(size: str, count: int, device: torch.device | str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A batch as the processor makes it: in every prompt one image of rows × columns tokens, the rest words."""
    sizes, patch = SIZES[size], TOWERS[size]["patch_size"]
    tokens, grid = sizes["rows"] * sizes["columns"], (1, 2 * sizes["rows"], 2 * sizes["columns"])
    ids = torch.randint(FIRST_WORD, sizes["words"], (count, sizes["prompt"]), device=device)
    ids[:, 0], ids[:, 1 : 1 + tokens], ids[:, 1 + tokens] = START, IMAGE, END
    pixels = torch.randn(4 * tokens * count, 3 * 2 * patch * patch, device=device, dtype=dtype)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([grid] * count, device=device),
    }


def random_factors(model: Any, rank: int) -> dict[str, Factors]:
    """Factors of every projection with orthonormal columns on average, small against the weights."""
    factors = {}
    for name, linear in text_linears(model).items():
        out, inner = linear.weight.shape
        options = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        U, Vh = torch.randn(out, rank, **options) / out**0.5, torch.randn(rank, inner, **options) / inner**0.5
        factors[name] = Factors(name, name, U, 0.01 * torch.linspace(1, 0.1, rank), Vh, 1.0, 0.0)
    return factors
