"""The command `choose`: the whole race on the lab, and what is refused before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from vlmgraft.lab.exam import draw_exam, save_questions
from vlmgraft.storage.jsonl import read_rows


@pytest.mark.slow
def test_a_race_on_the_lab(vlmgraft: Callable[..., Any], trio: Path, tmp_path: Path) -> None:
    """Three rules and FRISM, a few questions: strengths at the budget, a winner whose recipe merges, resumable."""
    save_questions(draw_exam(0, "calibration", {"colour": 8, "read": 8}).questions, tmp_path / "c.jsonl")
    calibration = {"data": str(tmp_path / "c.jsonl"), "samples": 8, "held_out": 8, "max_new_tokens": 8}
    models = {"vlm": "vlm", "donor": "donor", "donor_base": "base"}
    method = {"name": "frism", "steps": 1, "kl_budget": 0.01, "calibration": calibration}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**{key: str(trio / name) for key, name in models.items()}, "method": method}))
    rules = [word for name in ("task_arithmetic", "linear", "rank_1", "frism") for word in ("--rule", name)]
    asked = ("choose", file, *rules, "--budget", "0.02", "--samples", "40", "--out", tmp_path / "out")
    ran = vlmgraft(*asked, "--quiet", "--json")
    assert ran.code == 0, ran.err
    choice = json.loads(ran.out)
    rows = {row["method"]: row for row in choice["rows"]}
    assert list(rows) == ["VLM", "task_arithmetic", "linear", "rank_1", "frism"]
    for name in ("task_arithmetic", "linear", "rank_1", "frism"):
        assert 0.97 * 0.02 <= rows[name]["kl"] <= 0.02 and rows[name]["strength"] > 0
    winner = choice["winner"]
    validated = {name: row["validation"]["mean"] for name, row in rows.items() if name != "VLM" and "reasoning" in row}
    assert rows[winner]["fate"] == "winner" and validated[winner] == max(validated.values())
    assert all("behind" in row for name, row in rows.items() if name in validated and name != winner)
    assert list(read_rows(tmp_path / "out" / "choose.jsonl")) == choice["rows"]
    assert (tmp_path / "out" / "choose.svg").read_text().lstrip().startswith("<?xml")
    work = ("--workdir", tmp_path / "out" / winner) if winner == "frism" else ()
    assert vlmgraft("merge", tmp_path / "out" / "winner.yaml", *work, "--out", tmp_path / "merged").code == 0
    assert vlmgraft(*asked, "--quiet").code == 2
    again = vlmgraft(*asked, "--quiet", "--json", "--resume")
    assert json.loads(again.out) == choice


def test_a_race_that_cannot_be_is_refused_before_a_model_is_loaded(
    vlmgraft: Callable[..., Any], trio: Path, tmp_path: Path
) -> None:
    file = tmp_path / "r.yaml"
    models = {"vlm": "vlm", "donor": "donor", "donor_base": "base"}
    file.write_text(yaml.safe_dump({key: str(trio / name) for key, name in models.items()}))
    for words, message in ((("--budget", "0"), "must be above 0"), (("--rule", "ties"), "ties needs vlm_base")):
        ran = vlmgraft("choose", file, *words, "--out", tmp_path / "out", "--quiet")
        assert ran.code == 2 and message in ran.err and not (tmp_path / "out").exists()


def test_rules_budget_and_rounds_reach_the_race(
    vlmgraft: Callable[..., Any], stand_in: Callable[..., Any], tmp_path: Path
) -> None:
    """And the winner's recipe is named with the command that merges it."""
    vlm = {"method": "VLM", "setting": "", "order": 0, "kl": 0.0}
    both = {kind: {"mean": 0.5, "low": 0.4, "high": 0.6} for kind in ("reasoning", "perception")}
    rows = [{**vlm, **both}, {**vlm, **both, "method": "ties", "kl": 0.02, "fate": "winner"}]
    choice = SimpleNamespace(rows=rows, recipe=tmp_path / "winner.yaml", winner="ties")
    asked = stand_in("vlmgraft.analysis.choice", "choose", choice)
    words = (
        "choose",
        "r.yaml",
        "-o",
        tmp_path,
        "--rule",
        "ties",
        "--rule",
        "dare",
        "--budget",
        "0.02",
        "--rounds",
        "2",
    )
    ran = vlmgraft(*words, "--set", "layers=0")
    assert ran.code == 0, ran.err
    ((recipe, out, _), options) = asked[0]
    assert (recipe, out, options.pop("progress") is None) == (Path("r.yaml"), tmp_path, False)
    assert options == {
        "budget": 0.02, "rules": ["ties", "dare"], "rounds": 2, "overrides": ["layers=0"], "resume": False,
    }  # fmt: skip
    assert f"ties wins: vlmgraft merge {tmp_path / 'winner.yaml'} --out merged" in ran.err
    assert "50.0 [40.0, 60.0]" in ran.out and "winner" in ran.out
    assert "at most 0.02 nats per token" in (tmp_path / "choose.svg").read_text()
