"""JSON lines: appended, read, cut short by an interruption, damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel, TypeAdapter

from vlmgraft.errors import DamagedError
from vlmgraft.storage.jsonl import append_row, read_json, read_rows, write_json, write_rows


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), max_size=4),
    cut=st.integers(0, 10_000),
    flush=st.booleans(),
)
def test_a_log_cut_anywhere_goes_on(
    rows: list[dict[str, int]], cut: int, flush: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "log.jsonl"
    path.unlink(missing_ok=True)
    for row in rows:
        append_row(path, {**row, "long": "x" * 5000})
    whole = path.read_bytes() if rows else b""
    path.write_bytes(whole[: cut % (len(whole) + 1)])
    kept = path.read_bytes().count(b"\n")
    append_row(path, {"last": 1}, flush=flush)
    found = list(read_rows(path))
    assert found == [*({**row, "long": "x" * 5000} for row in rows[:kept]), {"last": 1}]


def test_rows_are_plain_json_lines(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": "ß\n"}, {"a": [1.5, None]}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    assert list(read_rows(tmp_path / "rows.jsonl")) == rows
    write_json(tmp_path / "one.json", rows[0])
    assert read_json(tmp_path / "one.json") == rows[0]


@pytest.mark.parametrize("line", [b"[1]", b"{", b"\xff", b"[" * 100_000, b"NaN2"])
def test_a_damaged_line_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(DamagedError, match=r"rows\.jsonl, line 2: is not what vlmgraft wrote"):
        list(read_rows(path))
    path.write_bytes(line)
    with pytest.raises(DamagedError, match=r"rows\.jsonl: is not what"):
        read_json(path)


class Row(BaseModel):
    a: float
    b: str = "none"


def test_rows_of_a_kind_have_its_fields_and_others_are_named(tmp_path: Path) -> None:
    path, kind = tmp_path / "rows.jsonl", TypeAdapter(Row)
    write_rows(path, [{"a": 1, "c": 2}, {"a": 0.5, "b": "x"}])
    assert list(read_rows(path, kind)) == [{"a": 1.0, "b": "none"}, {"a": 0.5, "b": "x"}]
    for bad in ({"a": "1"}, {"b": "x"}, {"a": True}):
        write_rows(path, [{"a": 1}, bad, {"a": 1}])
        with pytest.raises(DamagedError, match=r"rows\.jsonl, line 2: is not what vlmgraft wrote \(.*a.*\); take"):
            list(read_rows(path, kind))
        write_json(path, bad)
        with pytest.raises(DamagedError, match=r"rows\.jsonl: is not what vlmgraft wrote"):
            read_json(path, kind)
