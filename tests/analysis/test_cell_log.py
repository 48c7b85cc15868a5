"""The log of cells: what is there is not measured again, other settings are refused, a cut line is dropped."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmgraft.analysis.bench import CellLog
from vlmgraft.errors import DamagedError, OutputError
from vlmgraft.storage.jsonl import read_rows

CELLS = [{"layer": layer, "part": "mlp"} for layer in range(3)]


def measured(folder: Path, cells: list[dict[str, object]], resume: bool = False, **settings: object) -> list[int]:
    """The layers that had to be measured."""
    calls: list[int] = []

    def measure(cell: object) -> dict[str, int]:
        calls.append(cell["layer"])  # type: ignore[index]
        return {"value": 10 * calls[-1]}

    log = CellLog(folder, "cells", ("layer", "part"), settings, resume=resume)
    rows = list(log.measure(cells, measure))
    assert [row["value"] for row in rows] == [10 * cell["layer"] for cell in cells]  # type: ignore[operator]
    return calls


def test_a_resumed_log_measures_only_what_is_missing(tmp_path: Path) -> None:
    assert measured(tmp_path, CELLS[:2], model="a") == [0, 1]
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"layer": 2, "pa')
    assert measured(tmp_path, CELLS, resume=True, model="a") == [2]
    assert [row["layer"] for row in read_rows(tmp_path / "cells.jsonl")] == [0, 1, 2]


def test_rows_of_another_run_are_refused(tmp_path: Path) -> None:
    measured(tmp_path, CELLS, model="a")
    with pytest.raises(OutputError, match="--resume"):
        measured(tmp_path, CELLS, model="a")
    with pytest.raises(OutputError, match="model 'a', not 'b'"):
        measured(tmp_path, CELLS, resume=True, model="b")
    (tmp_path / "cells.jsonl").write_text('{"layer": 0}\n')
    with pytest.raises(DamagedError, match="layer, part"):
        measured(tmp_path, CELLS, resume=True, model="a")
