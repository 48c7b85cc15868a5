"""The command `evaluate`: its data, its columns, and how its options reach the asking."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.errors import DataError
from vlmgraft.evaluation.evaluate import Asking


def test_the_lab_is_data_like_any_other(
    trio: Path, tmp_path: Path, vlmgraft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lab").mkdir()  # a folder of that name is no data
    monkeypatch.chdir(tmp_path)
    ran = vlmgraft(
        "evaluate", trio / "vlm", "--data", "lab", "--limit", 12, "--out", tmp_path / "e", "--quiet", "--json"
    )
    assert ran.code == 0
    found = json.loads(ran.out)
    assert found["counts"]["items"] == 12 and found["tasks"][0]["task"] == "sum"


def test_every_option_reaches_the_asking(stand_in: Callable[..., Any], vlmgraft: Callable[..., Any]) -> None:
    """By the names that `Asking` has, and nothing else does."""
    asked = stand_in("vlmgraft.evaluation.evaluate", "evaluate", DataError("stop here"))
    given: dict[str, Any] = {
        "batch_size": 3, "max_new_tokens": 5, "suffix": "In short.", "dtype": "bfloat16", "seed": 7, "limit": 9,
        "temperature": 0.5, "top_p": 0.9, "engine": "vllm", "split": "test", "config": "all", "steer": "v.safetensors",
        "steer_strength": 0.25, "judge": "http://127.0.0.1:9/v1", "judge_model": "m", "device": "cpu",
    }  # fmt: skip
    words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)]
    columns = ("--column", "question=query", "--column", "images=photo=1")
    data = ("--data", "a.jsonl", "--data", "pope")
    ran = vlmgraft("evaluate", "m", *data, "-o", "out", "--resume", "--circular", "-q", *words, *columns)
    assert (ran.code, ran.err) == (2, "vlmgraft: stop here\n")
    ((args, options),) = asked
    assert args == ("m", ["a.jsonl", "pope"], Path("out"))
    expected = {**given, "circular": True, "columns": {"question": "query", "images": "photo=1"}}
    assert options == {**expected, "resume": True, "progress": None}
    assert set(expected) == set(Asking.__dataclass_fields__)


@pytest.mark.parametrize("pair", ["question", "=query", "question="])
def test_a_column_is_a_field_and_a_name(pair: str, vlmgraft: Callable[..., Any]) -> None:
    ran = vlmgraft("evaluate", "m", "--data", "a.jsonl", "-o", "out", "--column", pair)
    assert ran.code == 2 and f"--column {pair!r}: write field=column" in ran.err
