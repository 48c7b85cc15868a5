"""The command `costs`: of a published size, a model or a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.checkpoint.index import open_checkpoint


def test_costs_of_a_published_size(vlmgraft: Any) -> None:
    printed = json.loads(vlmgraft("costs", "--size", "7b", "--gpus", "8", "--json").out)
    assert printed["model"] == "Qwen2.5-VL-7B"
    assert [stage["name"] for stage in printed["stages"]] == [
        "merge", "decompose", "teacher", "gates", "fold", "evaluate",
    ]  # fmt: skip
    assert vlmgraft("costs").code == vlmgraft("costs", "--size", "7b", "--rank", "half").code == 2


def test_a_model_is_counted_from_its_config(trio: Path, vlmgraft: Any, recipe: Callable[..., Path]) -> None:
    """With the tower: as many as the checkpoint's tensors have elements."""
    by_folder = json.loads(vlmgraft("costs", trio / "vlm", "--json").out)
    by_recipe = json.loads(vlmgraft("costs", recipe("ta", name="task_arithmetic"), "--json").out)
    assert by_folder == by_recipe and by_folder["model"] == str(trio / "vlm")
    tensors = open_checkpoint(trio / "vlm").tensors.values()
    assert by_folder["parameters"] == sum(info.elements for info in tensors)


def test_more_gpus_and_slower_ones_take_their_time(vlmgraft: Any) -> None:
    def seconds(*words: str) -> dict[str, float]:
        return {
            one["name"]: one["seconds"]
            for one in json.loads(vlmgraft("costs", "--size", "7b", "--json", *words).out)["stages"]
        }

    one, eight, older = seconds(), seconds("--gpus", "8"), seconds("--gpu", "A100")
    assert eight["teacher"] < one["teacher"] < older["teacher"]
    full = seconds("--rank", "full")
    assert full["decompose"] > one["decompose"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "costs: give a recipe or a model, or --size with one of 3b, 7b"),
        (("model", "--size", "7b"), "costs: give a recipe or a model, or --size"),
        (("--size", "7b", "--rank", "half"), "--rank 'half': write full, or a number of directions"),
        (("--size", "8b"), "--size"),
        (("--size", "7b", "--gpus", "0"), "--gpus"),
    ],
)
def test_what_is_not_clear_is_asked_for(words: tuple[str, ...], said: str, vlmgraft: Any) -> None:
    ran = vlmgraft("costs", *words)
    assert ran.code == 2 and said in ran.err


def test_the_table_is_headed_by_what_was_asked(vlmgraft: Any) -> None:
    said = vlmgraft("costs", "--size", "7b", "--gpus", "8", "--gpu", "A100", "--rank", "64").out
    assert said.startswith("Qwen2.5-VL-7B, ") and "billion parameters, rank 64, 8 A100" in said.splitlines()[0]
    assert "decompose" in said and "operations" in said
