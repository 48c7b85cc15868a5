"""Image features that are kept while a batch is answered are what the tower gives for other batches, in every form
that families have them in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from zoo import Trio

from vlmgraft.hf.capture import capture_text_inputs
from vlmgraft.hf.features import DEEPER, ImageFeatures, without_pixels
from vlmgraft.hf.models import load_vlm

IMAGE = 5


def pixels(family: str, number: int) -> dict[str, torch.Tensor]:
    """One image as the family's processor gives it; Qwen's differ in size."""
    random = torch.Generator().manual_seed(number)
    if family.startswith("qwen"):
        grid = [1, 4, 4 if number % 2 else 2]
        flat = torch.randn(grid[1] * grid[2], 3 * 2 * 64, generator=random)
        return {"pixel_values": flat, "image_grid_thw": torch.tensor([grid])}
    image = torch.randn(1, 3, 16, 16, generator=random)
    if family == "llava_next":
        return {"pixel_values": torch.stack([image, image], 1), "image_sizes": torch.tensor([[16, 16]])}
    return {"pixel_values": image[None] if family == "idefics3" else image}


@pytest.mark.parametrize("case", ["qwen2_5_vl", "qwen3_vl", "llava_next_qwen2", "idefics3", "internvl3", "gemma3"])
def test_features_of_one_batch_serve_in_others(case: str, zoo: Callable[[str], Trio]) -> None:
    folders = zoo(case)
    model, family = load_vlm(folders.vlm, torch.float32), folders.case.family
    for key, value in {"image_token_id": IMAGE, "vision_start_token_id": 6, "video_token_id": 4}.items():
        setattr(model.config, key, value)
    images = [pixels(family, number) for number in range(4)]
    calls: list[int] = []
    tower = model.model.get_image_features

    @wraps(tower)  # transformers looks at the arguments' names
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return tower(*args, **kwargs)

    def batch(numbers: list[int]) -> dict[str, torch.Tensor]:
        rows = []
        for number in numbers:
            pooled = tower(**images[number], return_dict=True).pooler_output
            pooled = torch.cat(list(pooled)) if isinstance(pooled, list | tuple) else pooled
            rows.append([7] * number + [6] + [IMAGE] * (pooled.numel() // pooled.shape[-1]) + [9, 10])
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        kinds = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
        marks = {kinds: (ids == IMAGE).int()} if family == "gemma3" or family.startswith("qwen") else {}
        stacked = {key: torch.cat([images[number][key] for number in numbers]) for key in images[0]}
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), **marks, **stacked}

    with torch.no_grad():
        everything, parts = batch([0, 1, 2, 3]), {(2, 0): batch([2, 0]), (1, 3): batch([1, 3])}
        expected = {numbers: capture_text_inputs(model, inputs) for numbers, inputs in parts.items()}
        model.model.get_image_features = counted
        features = ImageFeatures(model, {IMAGE})
        with features.recorded() as found:
            model.generate(**everything, max_new_tokens=3, do_sample=False, pad_token_id=0)
        features.keep(range(4), found)
        assert len(features.rows) == 4
        for numbers, inputs in parts.items():
            with features.recalled(numbers):
                given = capture_text_inputs(model, without_pixels(inputs))
            for key, value in expected[numbers].items():
                for one, other in zip(*((x if key == DEEPER else [x]) for x in (given[key], value)), strict=True):
                    assert torch.allclose(one, other, atol=1e-5) if isinstance(other, torch.Tensor) else True, key
            assert (DEEPER in given) == (case == "qwen3_vl")
            assert features.agree(numbers, inputs["input_ids"], given)
        assert calls == [1], "the tower ran while they were answered"
        with features.recalled((1, 3)):
            again = [capture_text_inputs(model, parts[1, 3])["inputs_embeds"] for _ in range(2)]
        assert torch.equal(again[0], expected[1, 3]["inputs_embeds"]) and torch.equal(*again)
        assert calls == [1, 1] and not features.rows, "what was read is freed; then a batch costs one run"
