"""A dry run: the plan, what would be refused, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.recipe_place import Place
from vlmgraft.costs import dry_run
from vlmgraft.recipe.model import load_recipe


def test_dry_run_gives_the_plan_and_writes_nothing(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    before = place.files()
    told = vlmgraft("merge", place.write(), "--dry-run", "--out", place.out)
    asked = vlmgraft("merge", place.write(), "--dry-run", "--json")
    assert (told.code, asked.code, place.files()) == (0, 0, before)
    assert "28 merged" in told.out
    plan = json.loads(asked.out)
    assert plan["merged"] == 28
    assert plan["merged"] + plan["kept"] + plan["excluded"] == len(plan["tensors"])
    assert plan["nbytes"] == sum(
        tensor.numel() * 2 for tensor in load_file(trio / "vlm" / "model.safetensors").values()
    )


def workdir_in_output(place: Place) -> tuple[list[str], list[str]]:
    return ["--workdir", str(place.out / "work")], ["--workdir", "beside"]


def output_exists(place: Place) -> tuple[list[str], list[str]]:
    place.out.mkdir()
    return [], ["exists"]


@pytest.mark.parametrize("mistake", [workdir_in_output, output_exists], ids=lambda mistake: mistake.__name__)
def test_an_output_that_a_merge_would_refuse(mistake: Any, trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "frism")
    more, parts = mistake(place)
    printed = place.refused(vlmgraft, more, parts)
    assert "│ decompose " in printed, "priced all the same"


def test_a_full_disk_and_a_folder_without_access_are_seen_before(
    trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1_000_000))
    monkeypatch.setattr(os, "access", lambda *_: False)
    faults = dry_run.dry_run(load_recipe(place.write()), place.out).faults
    assert any("may not be written" in fault for fault in faults)
    assert any("make room" in fault and "0.00 GB will be written" in fault for fault in faults)
