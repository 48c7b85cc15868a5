"""Presets: every benchmark has one, with columns, a metric and a group score that exist."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from vlmgraft.evaluation.metrics import METRICS
from vlmgraft.evaluation.presets import JSON, PRESETS, YES_NO, Columns

LAYOUTS = json.loads(Path(__file__).with_name("layouts.json").read_text("utf-8"))


def test_every_preset_has_rows_and_every_benchmark_a_preset() -> None:
    named = "mathvista mathverse mathvision wemath logicvista mmmu mmstar dynamath pope vizwiz textvqa chartqa ocrbench"
    assert set(PRESETS) == {*named.split(), "realworldqa", "hallusionbench"} == set(LAYOUTS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_whole(name: str) -> None:
    preset = PRESETS[name]
    assert preset.metric in METRICS and preset.kind in ("reasoning", "perception") and "/" in preset.source
    assert preset.pairing in ("", "all_right", "worst", "four_way", "pairs") and preset.max_new_tokens >= 64
    assert bool(preset.pairing) == bool(preset.columns.group)
    assert all(isinstance(getattr(preset.columns, field.name), tuple) for field in fields(Columns))


def test_perception_is_asked_shortly_and_reasoning_is_not() -> None:
    assert {name for name in PRESETS if PRESETS[name].max_new_tokens > 256} == {
        name for name in PRESETS if PRESETS[name].kind == "reasoning"
    }
    assert PRESETS["pope"].suffix == PRESETS["hallusionbench"].suffix == YES_NO
    assert PRESETS["dynamath"].suffix == JSON and '"short answer"' in JSON
