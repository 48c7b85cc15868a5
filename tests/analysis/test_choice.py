"""The race: who is dropped, who wins, what is written; and the whole command on the lab."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vlmgraft.analysis.choice import dominated
from vlmgraft.analysis.scores import Scores, from_marks
from vlmgraft.evaluation.intervals import bootstrap
from vlmgraft.lab.exam import draw_exam, save_questions
from vlmgraft.storage.jsonl import read_rows


class Kinds:
    reasoning = ("sum",)
    perception = ("read",)
    label = ""

    def __call__(self, model: Any) -> Any:
        raise NotImplementedError


def scored(sums: str) -> Scores:
    return from_marks({"sum": sums, "read": "10"}, Kinds())


def test_who_is_behind_beyond_chance_is_dropped() -> None:
    """100 paired items: 60 right; 20 of those wrong is beyond chance; two is not, and eight not for fifteen rules."""
    leader = "1" * 60 + "0" * 40
    scores = {
        "leader": scored(leader),
        "far": scored("0" * 20 + leader[20:]),
        "near": scored("00" + leader[2:]),
        "between": scored("0" * 6 + leader[6:]),
    }
    assert dominated(scores, ("sum",), 1) == ["far", "between"]
    assert dominated(scores, ("sum",), 15) == ["far"]
    assert dominated({"leader": scored(leader)}, ("sum",), 15) == []


def test_a_wider_level_is_a_wider_interval() -> None:
    """Bonferroni for fifteen rules, against the normal approximation: 2.94 standard errors in place of 1.96."""
    values = np.random.default_rng(0).random(400)
    error = values.std() / 20
    for level, deviations in ((0.95, 1.96), (1 - 0.05 / 15, 2.935)):
        estimate = bootstrap([values], level=level)
        assert (estimate.high - estimate.low) / 2 == pytest.approx(deviations * error, rel=0.1)


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
