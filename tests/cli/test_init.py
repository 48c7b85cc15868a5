"""The command `init`: a recipe that merges, with as many questions as there are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml


def test_init_writes_a_recipe_that_merges(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    donor = tmp_path / "donor"
    shutil.copytree(trio / "donor", donor)
    (donor / "README.md").write_text(f"---\nbase_model: {trio / 'base'}\n---\n")
    recipe = tmp_path / "of a new folder" / "recipe.yaml"
    ran = vlmgraft("init", "--vlm", trio / "vlm", "--donor", donor, "-o", recipe, "--json")
    assert json.loads(ran.out) == {"out": str(recipe), "donor_base": str(trio / "base")}
    assert vlmgraft("merge", recipe, "-o", tmp_path / "merged", "-q").code == 0
    assert vlmgraft("init", "-o", recipe).code == 2, "it exists"
    absent = vlmgraft("init", "-o", recipe, "--force", "--data", tmp_path / "none.jsonl")
    assert absent.code == 2 and "none.jsonl: no such question file" in absent.err


@pytest.mark.parametrize(("rows", "shares"), [(3, (2, 1)), (192, (128, 64)), (384, (256, 128)), (900, (512, 128))])
def test_init_takes_as_many_questions_as_the_file_has(
    tmp_path: Path, vlmgraft: Any, rows: int, shares: tuple[int, int]
) -> None:
    data, recipe = tmp_path / "questions: 1.jsonl", tmp_path / "recipe.yaml"
    data.write_text('{"image": "a.png", "question": "what?"}\n' * rows)
    ran = vlmgraft("init", "-o", recipe, "--vlm", "a/b", "--donor", tmp_path / "c", "--data", data)
    assert ran.code == 0, ran.err
    loaded = yaml.safe_load(recipe.read_text())
    assert loaded["method"]["name"] == "frism" and loaded["method"]["calibration"]["data"] == str(data)
    assert (loaded["method"]["calibration"]["samples"], loaded["method"]["calibration"]["held_out"]) == shares
    assert f"{rows} questions; {shares[0]} are learned from, {shares[1]} others" in ran.err
    told = "write donor_base, the model that the donor was tuned from"
    assert told in ran.out and f"inspect --vlm a/b --donor {tmp_path / 'c'} --distances --donor-base ONE" in ran.out
    later = vlmgraft("inspect", recipe)
    assert later.code == 2 and "donor_base: method frism needs it" in later.err
