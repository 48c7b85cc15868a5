"""The command `inspect`: headers by recipe or options, weights and predictions when asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from broken_inputs import truncated_shard

from tests.recipe_place import Place
from vlmgraft.cli.app import app
from vlmgraft.lab.exam import draw_exam, save_questions
from vlmgraft.storage.jsonl import read_rows

Run = Callable[..., Any]


def test_inspect_by_recipe_and_by_options_agree(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    models = [
        part for key in ("vlm", "donor", "donor_base") for part in (f"--{key.replace('_', '-')}", place.recipe[key])
    ]
    by_recipe = vlmgraft("inspect", place.write(), "--json")
    by_options = vlmgraft("inspect", *models, "--json")
    assert (by_recipe.code, by_options.code) == (0, 0)
    planned, paired = json.loads(by_recipe.out), json.loads(by_options.out)
    assert planned.pop("cost") and paired.pop("cost") is None, "without a method there is no cost"
    assert planned == paired
    assert planned["layers"] == 4
    assert "28 merged" in vlmgraft("inspect", *models).out
    assert vlmgraft("inspect", "--vlm", place.recipe["vlm"]).code == 2
    both = vlmgraft("inspect", tmp_path / "recipe.yaml", *models[:2])
    assert both.code == 2 and "--set vlm=FOLDER" in both.err


def test_inspect_refuses_a_truncated_file(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    said = truncated_shard(place)
    ran = vlmgraft("inspect", place.write())
    assert ran.code == 2
    assert all(part in ran.err for part in said)


def test_inspect_reads_weights_only_when_asked(vlmgraft: Run, trio: Path, tmp_path: Path) -> None:
    sides = ("inspect", "--vlm", trio / "vlm", "--donor", trio / "donor", "--donor-base", trio / "base")
    assert "28 merged" in vlmgraft(*sides).out
    assert "need --distances" in vlmgraft(*sides, "--spectra").err
    ran = vlmgraft(*sides, "--distances", "--spectra", "--quiet", "--out", tmp_path / "i")
    assert ran.code == 0 and "distances: ‖τ‖/‖W‖ 0.0" in ran.out and "safe" not in ran.out
    assert len(list(read_rows(tmp_path / "i" / "spectra.jsonl"))) == 28
    found = json.loads(vlmgraft(*sides, "--distances", "--quiet", "--json").out)
    assert 0.05 < found["extent"]["median_ratio"] < found["extent"]["largest_ratio"] and len(found["distances"]) == 8


def test_inspect_says_what_the_models_do_not_share(vlmgraft: Run, trio: Path, tmp_path: Path) -> None:
    other = copytree(trio / "donor", tmp_path / "donor")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    sides = ("inspect", "--vlm", trio / "vlm", "--donor", other)
    assert "harmful: num_key_value_heads is 2 in the VLM, 4 in donor" in vlmgraft(*sides).out
    found = json.loads(vlmgraft(*sides, "--json").out)
    assert found["merged"] == 28 and found["differences"][0]["field"] == "num_key_value_heads"


def test_the_command(trio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save_questions(draw_exam(0, "calibration", {"colour": 2, "read": 2}), tmp_path / "questions.jsonl")
    models = ["--vlm", str(trio / "vlm"), "--donor", str(trio / "donor"), "--donor-base", str(trio / "base")]
    asked = ["inspect", *models, "--data", str(file), "--max-new-tokens", "12"]
    app([*asked, "--json"], standalone_mode=False)
    shown = json.loads(capsys.readouterr().out)
    assert [row["scale"] for row in shown["rows"]] == [0.1, 0.2, 0.3, 0.5, 0.75, 1.0]
    likely = [row["scale"] for row in shown["rows"] if row["holds"] >= 0.8]
    assert shown["holds_up_to"] == max(likely)
    app(asked, standalone_mode=False)
    assert f"hold up to λ {max(likely):g}" in capsys.readouterr().out
