"""The command `compare`: two runs item by item, or what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vlmgraft as vg
from tests.evaluation.lab_questions import SMALL, write_questions


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def whole(trio: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the VLM that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    vg.evaluate(trio / "vlm", questions, out, **SMALL)
    return out


def test_two_runs_are_compared_item_by_item(
    whole: Path, trio: Path, questions: Path, tmp_path: Path, vlmgraft: Callable[..., Any]
) -> None:
    ran = vlmgraft("compare", whole, trio / "vlm", "--data", questions, "--out", tmp_path / "c", "--quiet")
    assert ran.code == 0, ran.err
    assert "| reasoning average |" in ran.out and "| perception average |" in ran.out
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [row["name"] for row in found["tasks"]] == ["sum", "colour"] and found["tasks"][1]["difference"]["mean"] == 0
    assert (tmp_path / "c" / "comparison.md").read_text() == ran.out
    same = vg.compare(whole, whole)
    assert all(row.difference.mean == row.difference.low == row.difference.high == 0 for row in same.tasks)
    assert [row.p for row in same.tasks] == [1.0, 1.0]
    assert json.loads(vlmgraft("compare", whole, whole, "--json").out)["only_in_first"] == 0


def test_a_comparison_without_data_says_what_is_missing(whole: Path, trio: Path, vlmgraft: Callable[..., Any]) -> None:
    ran = vlmgraft("compare", whole, trio / "vlm")
    assert ran.code == 2 and "--data and --out" in ran.err
    ran = vlmgraft("evaluate", trio / "vlm", "--out", "e")
    assert ran.code == 2 and "--data is missing" in ran.err
    ran = vlmgraft("evaluate", trio / "vlm", "--out", "e", "--data", "x.jsonl", "--column", "question")
    assert ran.code == 2 and "field=column" in ran.err
