"""JSON lines of any origin: one by one, of bounded length, as texts that UTF-8 can hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from vlmgraft.data import lines
from vlmgraft.data.lines import json_lines, parse
from vlmgraft.errors import DataError


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda each: st.lists(each, max_size=3)))
def test_parsing_is_json(value: Any) -> None:
    assert parse(json.dumps(value, ensure_ascii=False).encode()) == value == parse(json.dumps(value).encode())


def test_half_a_character_is_refused_or_replaced() -> None:
    with pytest.raises(ValueError):
        parse(b'"\\ud800"')
    assert parse(b'"\\ud800"', "replace") == "?"


def test_empty_lines_are_passed_by_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n  \n{"b": "é"}', encoding="utf-8")
    assert list(json_lines(tmp_path / "a.jsonl")) == [(1, {"a": 1}), (4, {"b": "é"})]


def test_lines_are_read_one_by_one(tmp_path: Path) -> None:
    """What stands behind the first is not looked at before it is asked for."""
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"b": \n')
    rows = json_lines(tmp_path / "a.jsonl")
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not JSON .*every line must be one JSON object"):
        next(rows)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"[1]", r"line 1: must be a JSON object, got b'\[1\]'"),
        (b'{"a": "\xff"}', "line 1: not JSON"),
        (b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_what_is_no_object_is_named_with_its_line(raw: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(DataError, match=said):
        list(json_lines(tmp_path / "a.jsonl"))


def test_bytes_that_are_no_text_are_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}\n')
    assert list(json_lines(tmp_path / "a.jsonl", errors="replace")) == [(1, {"a": "\N{REPLACEMENT CHARACTER}"})]


def test_a_line_of_the_largest_length_is_read_and_a_longer_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 20)
    (tmp_path / "a.jsonl").write_text('{"a": "12345678901"}\n{"a": "123456789012"}\n')
    rows = json_lines(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="line 1: has more than 20 bytes; name images by path"):
        next(rows)
    (tmp_path / "a.jsonl").write_text('{"a": "1234567890"}\n')
    assert next(json_lines(tmp_path / "a.jsonl"))[1] == {"a": "1234567890"}


def test_a_file_that_is_none_is_no_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("gone.jsonl", "pipe", "."):
        with pytest.raises(DataError, match=str(tmp_path)):
            list(json_lines(tmp_path / name))
