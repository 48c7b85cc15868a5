"""The command `drift`: what it measures, and of what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipe_place import Place


def test_drift_of_a_model_from_itself_is_zero(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "frism")
    data = place.recipe["method"]["calibration"]["data"]
    ran = vlmgraft("drift", trio / "vlm", trio / "vlm", "--data", data, "--max-new-tokens", 4, "-q", "--json")
    assert json.loads(ran.out)["kl"] == pytest.approx(0, abs=1e-6)


def test_options_reach_the_measurement_and_its_figures_are_said(vlmgraft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "vlmgraft.analysis.kl_divergence", lambda *args, **options: asked.append((args, options)) or 0.0125
    )
    words = ("drift", "v", "m", "--data", "q.jsonl", "--max-new-tokens", 9, "--batch-size", 3, "-q")
    ran = vlmgraft(*words, "--steer", "s.safetensors", "--steer-strength", "0.5", "--json")
    found = json.loads(ran.out)
    assert (found["kl"], found["vlm"], found["model"], found["data"]) == (0.0125, "v", "m", "q.jsonl")
    options = {"max_new_tokens": 9, "batch_size": 3, "steer": "s.safetensors", "steer_strength": 0.5, "progress": None}
    assert asked == [(("m", "v", "q.jsonl"), options)], "the model first, then the VLM"
    said = vlmgraft(*words).out
    assert said.startswith("m: 0.0125 nats per token from v on q.jsonl, ")
    assert said.endswith(f"on such prompts: {found['perception_holds']:.2f}\n")


def test_a_question_file_that_is_missing_is_named(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    ran = vlmgraft("drift", trio / "vlm", trio / "vlm", "--data", tmp_path / "gone.jsonl", "-q")
    assert ran.code == 2 and "gone.jsonl" in ran.err and ran.out == ""
