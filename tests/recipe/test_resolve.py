"""A validated recipe takes no overrides in silence; a sorted calibration file is warned of."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from PIL import Image

from vlmgraft.errors import RecipeError
from vlmgraft.recipe.model import load_recipe
from vlmgraft.recipe.resolve import read_questions, read_recipe

PLAIN = {"vlm": "a", "donor": "b", "donor_base": "c", "method": {"name": "task_arithmetic", "scale": 0.5}}


def test_overrides_are_applied_or_refused() -> None:
    recipe = read_recipe(PLAIN, ["method.scale=0.25"])
    assert recipe.method.scale == 0.25
    assert read_recipe(load_recipe(PLAIN)).method.scale == 0.5
    with pytest.raises(RecipeError, match=r"method\.scale=1: a Recipe is validated already"):
        read_recipe(recipe, ["method.scale=1"])


def test_a_calibration_file_sorted_by_category_is_warned_of(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": f"{n}?", "category": "sum" if n < 4 else "colour"} for n in range(6)]
    recipe = {**PLAIN, "method": {"name": "frism", "calibration": {"data": str(tmp_path / "q.jsonl"), "samples": 4}}}

    def write(order: list[int]) -> None:
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(rows[n]) + "\n" for n in order))

    write([0, 1, 2, 3, 4, 5])
    with pytest.warns(UserWarning, match="the first 4 questions hold none of the category colour"):
        read_questions(load_recipe(recipe))
    write([0, 4, 1, 2, 5, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_questions(load_recipe(recipe))
