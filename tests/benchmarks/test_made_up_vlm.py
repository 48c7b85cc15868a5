"""The model of made-up weights has the published one's shapes, and its prompts go through the tower."""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from replica_tools import replicas, shapes_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("made_up_vlm")


def test_the_shapes_are_those_of_the_published_checkpoint(made_up: Any) -> None:
    """Names differ, as transformers renames on loading; every shape is there as often."""
    model = made_up.model_of("7B", "meta", torch.bfloat16)
    published = replicas()["Qwen/Qwen2.5-VL-7B-Instruct"]
    assert Counter(tuple(p.shape) for p in model.parameters()) == Counter(shapes_of(published).values())
    assert sum(p.numel() for p in model.parameters()) == published["parameters"]
    tower = model.config.vision_config
    assert (tower.num_heads, tower.window_size, tower.patch_size) == (16, 112, 14)
    assert list(tower.fullatt_block_indexes) == [7, 15, 23, 31]


@pytest.mark.parametrize(("size", "patches"), [("7B", 60 * 64), ("quick", 4 * 8)])
def test_prompts_are_as_long_as_they_say_with_an_image_in_each(made_up: Any, size: str, patches: int) -> None:
    batch, sizes = made_up.prompts(size, 2, "cpu", torch.float32), made_up.SIZES[size]
    assert batch["input_ids"].shape == (2, sizes["prompt"])
    assert math.prod(batch["image_grid_thw"][0].tolist()) == patches
    assert batch["pixel_values"].shape == (2 * patches, 3 * 2 * 14 * 14)
    assert (batch["mm_token_type_ids"].sum(1) == patches // 4).all(), "four patches to a token"
    assert (batch["input_ids"] != 0).all(), "0 is padding"


def test_reading_and_answering_look_at_the_images(made_up: Any) -> None:
    torch.manual_seed(0)
    model, batch = made_up.model_of("quick", "cpu", torch.float32), made_up.prompts("quick", 3, "cpu", torch.float32)
    other = {**batch, "pixel_values": batch["pixel_values"].clone()}
    other["pixel_values"][-1] += 10.0
    calls: list[str] = []
    model.model.visual.register_forward_hook(lambda *_: calls.append("tower"))
    with torch.no_grad():
        before, after = (model(**one, logits_to_keep=1).logits for one in (batch, other))
        model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(before[:2], after[:2]) and not torch.allclose(before[2], after[2])
    assert len(calls) == 3, "reading and answering run the tower once each"


def test_factors_fit_the_projections_of_the_text_model_alone(made_up: Any) -> None:
    model = made_up.model_of("quick", "cpu", torch.float32)
    factors = made_up.random_factors(model, 8)
    assert len(factors) == 2 * 7 and not any("visual" in name for name in factors)
    for name, one in factors.items():
        out, inner = model.model.language_model.get_parameter(name).shape
        assert one.U.shape == (out, 8) and one.Vh.shape == (8, inner) and one.s[0] == pytest.approx(0.01)
