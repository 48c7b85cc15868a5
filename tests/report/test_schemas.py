"""Rows that no command wrote are refused by file, line and field; what commands add beside them is passed by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from vlmgraft.errors import DamagedError
from vlmgraft.report import schemas
from vlmgraft.report.collect import collect
from vlmgraft.storage.jsonl import write_json, write_rows

KINDS = {
    "sweep/sweep.jsonl": {"reasoning": {"mean": 1}},
    "knockout/knockout.jsonl": {"mode": "other"},
    "ranks/ranks.jsonl": {"scale": "1"},
    "inspect/distances.jsonl": {"ratio": None},
    "inspect/spectra.jsonl": {"first": {"1": 1.0}},
    "inspect/inspection.json": {"extent": []},
    "merged/receipt.json": {"tensors": [{"name": "a"}]},
    "answers/answers.jsonl": {"answers": [{"model": "a"}]},
    "work/gates/gates.json": {"scale": {}},
    "work/gates/training.jsonl": {"step": -1},
}


@pytest.mark.parametrize("file", KINDS)
def test_a_file_that_no_command_wrote_is_named_with_line_and_field(file: str, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    path, line = tmp_path / "runs" / file, ""
    if path.suffix == ".jsonl":
        rows = [json.loads(text) for text in path.read_text().splitlines()]
        write_rows(path, [*rows, rows[-1] | KINDS[file], rows[0]])
        line = f", line {len(rows) + 1}"
    else:
        write_json(path, json.loads(path.read_text()) | KINDS[file])
    field = next(iter(KINDS[file]))
    with pytest.raises(DamagedError, match=rf"/{file}{line}: is not what vlmgraft wrote .*{field}.* whole copy"):
        collect([tmp_path / "runs"])


def test_a_rule_without_accuracies_was_dropped_and_one_with_wrong_ones_is_damaged() -> None:
    contender = TypeAdapter(schemas.Contender)
    dropped = contender.validate_python({"method": "linear", "fate": "dropped"})
    assert dropped.reasoning is None
    with pytest.raises(ValidationError, match="reasoning"):
        contender.validate_python({"method": "linear", "setting": "", "order": 0, "reasoning": {"mean": 1}})
