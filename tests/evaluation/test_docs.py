"""What docs/evaluate.md says is so."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

from vlmgraft.evaluation.presets import PRESETS
from vlmgraft.evaluation.run_records import Record

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")


def test_every_preset_is_listed_with_its_home() -> None:
    for name, preset in PRESETS.items():
        assert f"`{name}`" in TEXT and f"`{preset.source}`" in TEXT, name


def test_the_number_of_cases_and_the_speeds_are_the_committed_ones() -> None:
    cases = Path(__file__).with_name("cases.jsonl").read_text(encoding="utf-8").splitlines()
    assert f"holds {len(cases)} outputs" in TEXT
    measured = json.loads((ROOT / "benchmarks" / "results" / "evaluate.json").read_text())
    for size in ("8", "32", "128"):
        rate, times = measured["items_per_second"][size], measured["times_one_by_one"][size]
        assert re.search(rf"{rate:.0f} in\s+batches of {size}\b.*?\({times:.1f} ×\)", TEXT, re.DOTALL), size
    assert measured["times_one_by_one"]["32"] >= 5 and not any(measured["differing_answers"].values())


def test_named_fields_exist() -> None:
    known = {field.name for field in fields(Record)}
    assert {"state", "cut", "found", "repeated"} <= known and all(
        f"`{name}`" in TEXT for name in ("state", "cut", "found")
    )
