"""The command `demo`: which settings it takes, and where it reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.lab.demo import FULL, QUICK
from vlmgraft.storage.jsonl import write_rows

Run = Callable[..., Any]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `demo` is called with; it reports one line and leaves one row."""
    calls: list[dict[str, Any]] = []

    def demo(out: Path, **options: Any) -> None:
        calls.append({"out": out, **options})
        options["report"]("a table")
        out.mkdir(exist_ok=True)
        write_rows(out / "results.jsonl", [{"method": "VLM"}])

    monkeypatch.setattr("vlmgraft.lab.demo.demo", demo)
    return calls


def test_seed_trio_and_settings_reach_the_demo(vlmgraft: Run, made: list[dict[str, Any]], tmp_path: Path) -> None:
    ran = vlmgraft("demo", "--quick", "--seed", "7", "--trio", tmp_path, "-o", tmp_path / "a", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "a table\n", "")
    asked = made[0]
    assert (asked["out"], asked["seed"], asked["trio"]) == (tmp_path / "a", 7, tmp_path)
    assert asked["settings"] is QUICK and asked["progress"] is None
    assert vlmgraft("demo", "-o", tmp_path / "b").code == 0
    assert made[1]["settings"] is FULL and made[1]["seed"] == 0 and made[1]["progress"] is not None


def test_with_json_standard_output_has_the_rows_alone(
    vlmgraft: Run, made: list[dict[str, Any]], tmp_path: Path
) -> None:
    ran = vlmgraft("demo", "-o", tmp_path / "a", "--json")
    assert json.loads(ran.out) == {"out": str(tmp_path / "a"), "rows": [{"method": "VLM"}]}
    assert "a table" in ran.err


def test_a_folder_that_is_there_is_left_alone(vlmgraft: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    ran = vlmgraft("demo", "-o", tmp_path, "-q")
    assert ran.code == 2 and str(tmp_path) in ran.err and (tmp_path / "mine.txt").read_text() == "keep me"
