"""The table of limits in docs/reliability.md says what the code holds inputs to, and every limit is held to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vlmgraft.storage import limits

ROOT = Path(__file__).parents[2]
NAMES = [name for name in vars(limits) if name.startswith("MAX_")]
ROWS = {
    "a header, an index or a receipt": ("MAX_HEADER", "MAX_TENSORS", "MAX_TENSOR_NAME", "MAX_FILE_NAME"),
    "a config; layers": ("MAX_JSON", "MAX_LAYERS"),
    "a tokenizer's file": ("MAX_TOKENIZER", "MAX_TOKEN", "MAX_TEXT_GROWTH"),
    "beams": ("MAX_BEAMS",),
    "a recipe": ("MAX_RECIPE", "MAX_YAML_DEPTH", "MAX_YAML_ALIASES"),
    "a line of JSON": ("MAX_LINE", "MAX_PARQUET_RATIO"),
    "a JSON file of questions": ("MAX_DATA_JSON",),
}
"""How a row of the table begins, and the limits whose numbers stand in it, in their order."""


@pytest.mark.parametrize("row", ROWS)
def test_the_table_has_the_numbers_of_the_code(row: str) -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    (cell,) = re.findall(rf"^\| {re.escape(row)}[^|]*\| ([^|]+) \|$", text, re.M)
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", cell)]
    expected = [getattr(limits, name) for name in ROWS[row]]
    assert numbers[: len(expected)] == expected


def test_every_limit_is_in_the_table_and_held_to_somewhere() -> None:
    assert sorted(name for names in ROWS.values() for name in names) == sorted(NAMES)
    files = [path for path in (ROOT / "src" / "vlmgraft").rglob("*.py") if path != Path(limits.__file__)]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    used = {name: len(re.findall(rf"\b{name}\b", code)) for name in NAMES}
    assert [name for name, count in used.items() if count < 2] == [], "imported, and compared with"
