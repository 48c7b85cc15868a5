"""Rows from files: JSON in its forms, parquet, folders, splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from vlmgraft.data.questions import load_questions
from vlmgraft.data.sources import read_rows
from vlmgraft.data.traces import load_traces
from vlmgraft.errors import DataError
from vlmgraft.evaluation.readers import load_suite

ROWS = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
        ("r.json", json.dumps(ROWS)),
        ("r.json", "\n".join(map(json.dumps, ROWS))),  # JSON lines by another name
    ],
)
def test_json_in_its_forms(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_rows(tmp_path / name) == (ROWS, tmp_path)


def test_an_object_of_objects_gives_ids(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"x": ROWS[0], "y": ROWS[1]}))
    assert read_rows(tmp_path / "r.json")[0] == [{"id": "x", **ROWS[0]}, {"id": "y", **ROWS[1]}]


def test_parquet_a_folder_of_it_and_a_saved_data_set(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    (tmp_path / "files").mkdir()
    for name in ("train-0", "test-0"):
        data.to_parquet(str(tmp_path / "files" / f"{name}.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    assert read_rows(tmp_path / "files" / "test-0.parquet") == (ROWS, tmp_path / "files")
    assert len(read_rows(tmp_path / "files")[0]) == 4 and read_rows(tmp_path / "files", split="test")[0] == ROWS
    assert read_rows(tmp_path / "saved") == (ROWS, tmp_path / "saved")


def test_one_object_is_one_row(tmp_path: Path) -> None:
    """Also on one line, as a file of JSON lines that ends in .json."""
    (path := tmp_path / "r.json").write_text(json.dumps(ROWS[0]))
    assert read_rows(path)[0] == ROWS[:1]


def test_a_split_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    one, two = Dataset.from_list(ROWS[:1]), Dataset.from_list(ROWS[1:])
    DatasetDict({"test": one, "validation": two}).save_to_disk(str(tmp_path / "both"))
    assert read_rows(tmp_path / "both", split="validation")[0] == ROWS[1:]
    variants = read_rows(tmp_path / "both", split="all")[0]
    assert [row["variant"] for row in variants] == ["test", "validation"]
    with pytest.raises(DataError, match="has the splits test, validation; name one"):
        read_rows(tmp_path / "both")


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        (" ", None, "the name of the data is empty"),
        ("gone.jsonl", None, "no such file"),
        ("r.json", "3", "must be a list of objects"),
        ("r.json", "[1]", "must be a list of objects"),
        ("r.json", "{", "not JSON"),
        ("r.parquet", "x", "no parquet file"),
        ("r.txt", "x", "cannot be read; give .jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, source: str, content: Any, message: str) -> None:
    path: Any = tmp_path / source if source.strip() else source
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_parquet_without_rows_is_empty(tmp_path: Path) -> None:
    """As an export writes it whose filter let nothing through; beside a file with rows it adds none."""
    empty = pa.table({"question": pa.array([], pa.string())})
    parquet.write_table(empty, tmp_path / "a.parquet")
    for load, message in ((load_suite, "holds no row"), (load_questions, "no question"), (load_traces, "no row")):
        with pytest.raises(DataError, match=rf"a\.parquet: .*{message}"):
            load(tmp_path / "a.parquet")
    parquet.write_table(pa.table({"question": ["q"]}), tmp_path / "b.parquet")
    assert read_rows(tmp_path)[0] == [{"question": "q"}]


def test_a_column_of_maps_is_named(tmp_path: Path) -> None:
    maps = pa.array([[("A", "x"), ("B", "y")]], pa.map_(pa.string(), pa.string()))
    for column in (maps, pa.StructArray.from_arrays([maps], ["inner"])):
        parquet.write_table(pa.table({"question": ["q"], "choices": column}), tmp_path / "m.parquet")
        with pytest.raises(DataError, match=r"m\.parquet: column 'choices' holds maps.* write them as structs"):
            read_rows(tmp_path / "m.parquet")
