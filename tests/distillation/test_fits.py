"""What fits: ways of a training, and what is kept of its questions, against memory and disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmgraft.distillation import fits
from vlmgraft.distillation.fits import Kept, offloads, way_that_fits, ways_of
from vlmgraft.distillation.memory import Shapes, memory_of
from vlmgraft.errors import RecipeError
from vlmgraft.hf.batches import Question, encode
from vlmgraft.hf.models import load_config, load_processor
from vlmgraft.methods.calibration import Calibration
from vlmgraft.methods.curvature import Curvature
from vlmgraft.methods.frism import Frism


def test_it_fits_where_nine_tenths_of_the_memory_hold_it(trio: Path) -> None:
    shapes = Shapes.of(load_config(trio / "vlm"))
    ways = [(False, False), (True, False)]
    plain, low = (memory_of(shapes, rank=4, tokens=10, checkpointing=first).total for first, _ in ways)
    chosen = [way_that_fits(ways, shapes, size / 0.9, rank=4, tokens=10) for size in (plain + 1, low + 1, low - 1)]
    assert low < plain and chosen == [(False, False), (True, False), None]


def test_ways_that_a_recipe_allows() -> None:
    auto, never = Frism(), Frism(gradient_checkpointing=True, offload=False)
    assert ways_of(auto, True) == [(False, False), (True, False), (False, True), (True, True)]
    assert ways_of(auto, False) == [(False, False), (True, False)]
    assert ways_of(never, True) == [(True, False)]
    assert ways_of(Frism(gradient_checkpointing=False, offload=True), False) == [(False, True)]
    assert ways_of(Curvature(gradient_checkpointing=False), True) == [(False, False), (False, True)]


def test_bytes_that_are_kept_of_questions_by_hand() -> None:
    """Of two prompts of 10 and 30 tokens with answers of 5: rows of 8 numbers, three times as many with two more of
    Qwen3-VL's layers; distributions of 100 words whole, of 5,000 as 64 and a rest, with 64 ids."""
    config: Any = SimpleNamespace(hidden_size=8, vocab_size=100, get_text_config=lambda decoder: config)
    calibration = Calibration("none.jsonl", max_new_tokens=5)
    assert Kept.of(config, calibration, [10, 30], 2) == Kept(40 * 16 + 10 * 400, 50 * 16 + 10 * 400)
    config.vision_config = SimpleNamespace(deepstack_visual_indexes=[1, 2])
    config.vocab_size = 5000
    assert Kept.of(config, calibration, [10, 30], 2) == Kept(40 * 48 + 10 * 516, 50 * 48 + 10 * 516)
    served = Kept.of(config, replace(calibration, endpoint="http://h/v1", tokens="all"), [10, 30], 2)
    assert served == Kept(50 * 516, 50 * 48 + 50 * 516)


def test_what_a_folder_holds_already_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gates.teacher"
    monkeypatch.setattr(fits, "disk_of", lambda folder: (folder.parent, 60))
    with pytest.raises(RecipeError, match=r"gates.teacher: image features and answers take"):
        Kept(100, 0).check(folder)
    (folder / "key").mkdir(parents=True)
    (folder / "key" / "answers-0000.safetensors").write_bytes(bytes(40))
    assert "free in" in Kept(100, 0).check(folder)


LONG, SHORT = Question("what is it?" * 9), Question("what?")


@pytest.mark.parametrize(
    ("offload", "device", "size", "expected"),
    [
        (True, "cpu", 0, True),
        (False, "cuda", 0, False),
        ("auto", "cpu", 0, False),
        ("auto", "cuda", 1.0, False),  # checkpointed, the longest question's batches just fit
        ("auto", "cuda", 0.99, True),
        ("auto", "cuda", 0.01, True),  # nothing fits
    ],
)
def test_it_is_decided_before_models_are_loaded(
    offload: Any, device: str, size: float, expected: bool, trio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, processor = Shapes.of(load_config(trio / "vlm")), load_processor(trio / "vlm")
    length = encode(processor, [LONG])["input_ids"].shape[1] + 64
    needed = memory_of(shapes, rank=16, tokens=2 * length, answer_tokens=2 * 64, checkpointing=True)
    properties = SimpleNamespace(total_memory=size * needed.total / 0.9 + 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    method = Frism(rank=16, offload=offload, calibration=Calibration("none.jsonl", batch_tokens=2 * length + 1))
    asked = [SHORT] * 8 + [LONG] + [SHORT] * 8
    assert offloads(method, trio / "vlm", asked, torch.device(device), torch.bfloat16) is expected
