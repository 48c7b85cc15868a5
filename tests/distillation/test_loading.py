"""Models are loaded one after the other, and donors are asked what their questions are."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest

import vlmgraft as vg
from tests.distillation.test_learn import recipe_of
from vlmgraft.distillation import loading
from vlmgraft.errors import RecipeError
from vlmgraft.hf.models import load_vlm
from vlmgraft.storage.jsonl import write_rows


def test_every_donor_is_matched_on_its_own_questions(
    trio: Path, second: Path, image_calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, words in (("sums", "sum 4 5"), ("colours", "colour 1")):
        write_rows(tmp_path / f"{name}.jsonl", [{"question": words}] * 2)
    asked: list[tuple[str, int]] = []
    donors: list[weakref.ref[Any]] = []
    ordinary = loading.teacher_outputs

    def watched(side: Any, questions: Any, student: Any, **options: Any) -> Any:
        assert not any(donor() for donor in donors), "one donor at a time"
        donors.append(weakref.ref(side[0]))
        asked.append((questions[0].question, options["max_new_tokens"]))
        return ordinary(side, questions, student, **options)

    def loaded(*args: Any, **options: Any) -> Any:
        assert len(donors) == 2 and not any(donor() for donor in donors), "donors are freed before the VLM is loaded"
        return load_vlm(*args, **options)

    monkeypatch.setattr(loading, "teacher_outputs", watched)
    monkeypatch.setattr(loading, "load_vlm", loaded)
    files = [str(tmp_path / "sums.jsonl"), str(tmp_path / "colours.jsonl")]
    options = {"inject": "donor", "questions": files, "donor_tokens": 9, "inject_weight": 1.0, "steps": 2}
    recipe = recipe_of(trio, image_calibration, [str(trio / "donor"), str(second)], **options)
    factors = vg.decompose(recipe, tmp_path / "factors")
    gates = vg.gates(recipe, tmp_path / "factors", tmp_path / "gates")
    assert asked == [("sum 4 5", 9), ("colour 1", 9)] and len(gates.logits) == len(factors) == 14
    with pytest.raises(RecipeError, match=r"method\.donor_tokens: 0"):
        vg.load_recipe(recipe_of(trio, image_calibration, **{**options, "donor_tokens": 0}))
    with pytest.raises(RecipeError, match="3 files for 2 donors"):
        changed = recipe_of(
            trio, image_calibration, [str(trio / "donor"), str(second)], **{**options, "questions": [*files, files[0]]}
        )
        vg.gates(changed, tmp_path / "factors", tmp_path / "other")
