"""How long answers are is asked of the model itself, where that takes seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.recipe_place import Place
from vlmgraft.costs.device import Device
from vlmgraft.costs.dry_run import dry_run
from vlmgraft.costs.models import Model
from vlmgraft.costs.sample import longest_answer
from vlmgraft.data.questions import Question
from vlmgraft.hf import batches
from vlmgraft.hf.models import load_config
from vlmgraft.pipeline import merge

FAST = Device("fast", 1e12, 1e12, 1e12, 1e12, is_gpu=False, width=4)
PLACE = (torch.device("cpu"), torch.float32)


def asked(folder: Path, device: Device = FAST) -> int | None:
    questions = [Question(f"question {number}") for number in range(20)]
    return longest_answer(Model.of("lab", load_config(folder)), folder, questions, 20, 9, device, PLACE)


def test_questions_from_all_over_the_file_are_asked(trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 every third, seven in all; an answer as long as its question's number, but at most 9 tokens."""
    seen: list[int] = []

    def answer(_: Any, __: Any, questions: list[Question], limit: int) -> Any:
        numbers = [int(question.question.split()[1]) for question in questions]
        seen.extend(numbers)
        return [[1] * min(number, limit - 2) for number in numbers], []

    monkeypatch.setattr(batches, "generate_batch", answer)
    assert asked(trio / "vlm") == 7 and sorted(seen) == [0, 3, 6, 9, 12, 15, 18]


def test_nothing_is_asked_of_a_slow_device_or_without_weights(trio: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((trio / "vlm" / "config.json").read_bytes())
    assert asked(tmp_path) is None
    assert asked(trio / "vlm", replace(FAST, bandwidth=1e4)) is None


def test_a_device_that_is_full_is_no_fault(trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(batches, "generate_batch", full)
    assert asked(trio / "vlm") is None
    empty = longest_answer(Model.of("lab", load_config(trio / "vlm")), trio / "vlm", [], 20, 9, FAST, PLACE)
    assert empty is None


def test_the_dry_run_reckons_with_the_answers_that_the_merge_gets(trio: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, trio, "frism")
    place.recipe["method"]["calibration"]["max_new_tokens"] = 40
    dry = dry_run(place.write(), place.out)
    merge(place.write(), place.out, workdir=tmp_path / "work")
    units = [load_file(file) for file in (tmp_path / "work" / "gates.teacher").rglob("*.safetensors")]
    longest = max(int(unit["lengths"].max()) for unit in units if "lengths" in unit)
    assert 1 < longest < 40
    assert f"answers are reckoned at {longest} tokens, the longest of a few" in dry.notes
