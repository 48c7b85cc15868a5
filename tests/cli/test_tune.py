"""The command `tune`: what it needs, its device and dtype, and what it says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from tests.finetuning.lab_traces import recipe_on, write_traces


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_traces(tmp_path_factory.mktemp("traces"))


@pytest.fixture
def recipe(trio: Path, data: Path) -> dict[str, Any]:
    return recipe_on(trio, data)


def test_device_and_dtype(recipe: Any, tmp_path: Path, vlmgraft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU without `use_cpu`; in the dtype asked for, which is the recipe's; a GPU that is not there is named,
    and of several the trainer is shown the one asked for."""
    del recipe["train"]["use_cpu"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train = ("tune", tmp_path / "recipe.yaml", "--set", "train.max_steps=1")
    ran = vlmgraft(*train, "-o", tmp_path / "a", "--device", "cpu", "--dtype", "bfloat16", "--json", "-v")
    assert ran.code == 0 and json.loads(ran.out)["steps"] == 1, ran.err
    assert "info: step 1: loss" in ran.err, "the trainer's figures are in the log, not on standard output"
    written = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    assert written["dtype"] == "bfloat16" and "use_cpu" not in written["train"]
    seen: list[str | None] = []
    monkeypatch.setattr(torch, "empty", lambda *_, **__: _no_gpu(seen))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    ran = vlmgraft(*train, "-o", tmp_path / "b", "--device", "cuda:1")
    assert ran.code == 2 and "--device cuda" in ran.err and not (tmp_path / "b").exists()
    assert seen == ["6"] and os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert vlmgraft(*train, "-o", tmp_path / "b", "--dtype", "float16").code == 2


def _no_gpu(seen: list[str | None]) -> None:
    seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
    raise RuntimeError("No CUDA GPUs are available")


def test_what_is_missing_is_asked_for_and_the_schema_needs_neither(vlmgraft: Any) -> None:
    for words in ((), ("r.yaml",), ("-o", "out")):
        ran = vlmgraft("tune", *words)
        assert (ran.code, ran.err) == (2, "vlmgraft: tune: give a recipe and --out, the folder to write\n")
    schema = json.loads(vlmgraft("tune", "--schema").out)
    assert {"vlm", "donor", "prior", "train", "data"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_overrides_and_dtype_reach_the_tuning_and_its_figures_are_said(
    vlmgraft: Any, stand_in: Callable[..., Any], tmp_path: Path
) -> None:
    verdicts = [SimpleNamespace(verdict=verdict) for verdict in ("pushed", "kept", "pushed")]
    tuned = SimpleNamespace(steps=12, loss=0.5, verdicts=verdicts)
    asked = stand_in("vlmgraft.finetuning.tune", "tune", tuned)
    words = ("tune", "r.yaml", "-o", tmp_path / "o", "--set", "prior=none", "--dtype", "float32", "-q")
    ran = vlmgraft(*words, "--resume", "--json")
    assert json.loads(ran.out) == {"out": str(tmp_path / "o"), "steps": 12, "loss": 0.5, "pushed": 2}
    options = {"overrides": ["prior=none", "dtype=float32"], "resume": True, "progress": None}
    assert asked == [((Path("r.yaml"), tmp_path / "o"), options)]
    assert f"{tmp_path / 'o'}: 12 steps, mean loss 0.5000, 2 tensors pushed, " in vlmgraft(*words).out
