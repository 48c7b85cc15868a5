"""Records: what became of an item, and its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.errors import DataError
from vlmgraft.evaluation.ask import ask
from vlmgraft.evaluation.items import Item
from vlmgraft.evaluation.records import fault_record, load_records, record_of
from vlmgraft.storage.jsonl import append_rows, drop_cut_line

ASKED = {"tokens": 3, "prompt_tokens": 2}
SUM = Item("1", "1 + 1 ?", answers=("2",))


def test_records_survive_the_file(scripted: Any, sums: Any, adds: Any, tmp_path: Path) -> None:
    records = ask(scripted(adds), sums(3))
    append_rows(tmp_path / "r.jsonl", records)
    assert load_records(tmp_path / "r.jsonl") == records
    assert all(json.loads(line)["state"] == "scored" for line in (tmp_path / "r.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("output", "cut", "score", "found"),
    [
        ("2", False, 1.0, True),
        ("2", True, 0.0, False),  # it may have gone on as 21
        ("\\boxed{2}", True, 1.0, True),
        ("The answer is 2. Now", True, 1.0, True),
        ("3", False, 0.0, True),
        ("", False, 0.0, False),
    ],
)
def test_an_answer_that_the_limit_may_have_cut_does_not_count(
    output: str, cut: bool, score: float, found: bool
) -> None:
    record = record_of(SUM, "1 + 1 ?", output, cut=cut, **ASKED)
    assert (record.score, record.found, record.state) == (score, found, "scored")


def test_a_chosen_letter_stands_where_it_was_cut() -> None:
    item = replace(SUM, answers=("B",), choices=("1", "2"))
    assert record_of(item, "", "B", cut=True, **ASKED).score == 1


def test_states_and_verdicts() -> None:
    asked = record_of(replace(SUM, answers=()), "", "2", cut=False, **ASKED)
    failed, fault = fault_record(SUM, "no memory", failed=True), fault_record(SUM, "no picture", failed=False)
    assert (asked.state, asked.score, asked.verdict) == ("unscored", None, "unscored")
    assert (failed.state, failed.score, failed.verdict) == ("failed", 0.0, "wrong")
    assert (fault.state, fault.score, fault.verdict) == ("not asked", None, "not asked")
    assert record_of(SUM, "", "  ", cut=False, **ASKED).empty and not asked.empty
    assert record_of(SUM, "", "so 4 + " * 30, cut=True, **ASKED).repeated


def test_a_line_cut_short_is_dropped_at_the_end_only(tmp_path: Path) -> None:
    path, record = tmp_path / "r.jsonl", fault_record(SUM, "x", failed=True)
    append_rows(path, [record, record])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "cut')
    assert load_records(path) == [record, record]
    drop_cut_line(path)
    assert path.read_bytes() == whole
    path.write_bytes(b'{"id": "cut\n' + whole)
    with pytest.raises(DataError, match=r"r\.jsonl, line 1: no record"):
        load_records(path)
    with pytest.raises(DataError, match="no such file"):
        load_records(tmp_path / "none.jsonl")
