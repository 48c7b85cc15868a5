"""Tokenizers and generation configs that ask for too much are refused, those that people have are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.errors import CheckpointError
from vlmgraft.hf.limits import refuse_growth
from vlmgraft.storage.limits import MAX_BEAMS, MAX_TEXT_GROWTH, MAX_TOKEN


def folder_with(folder: Path, name: str, document: dict[str, Any]) -> Path:
    (folder / name).write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("key", ["num_beams", "num_return_sequences"])
def test_millions_of_sequences_are_refused(tmp_path: Path, key: str) -> None:
    refuse_growth(folder_with(tmp_path, "generation_config.json", {key: MAX_BEAMS}))
    with pytest.raises(CheckpointError, match=key):
        refuse_growth(folder_with(tmp_path, "generation_config.json", {key: MAX_BEAMS + 1}))


def test_replacements_that_multiply_are_counted_together(tmp_path: Path) -> None:
    one = {"type": "Replace", "pattern": {"String": " "}, "content": "x" * (MAX_TEXT_GROWTH // 2 + 1)}
    refuse_growth(folder_with(tmp_path, "tokenizer.json", {"normalizer": one}))
    both = {"type": "Sequence", "normalizers": [one, one]}
    with pytest.raises(CheckpointError, match="normalizer"):
        refuse_growth(folder_with(tmp_path, "tokenizer.json", {"normalizer": both}))


@pytest.mark.parametrize("as_list", [True, False])
def test_a_token_as_long_as_a_book_is_refused(tmp_path: Path, as_list: bool) -> None:
    long = "x" * (MAX_TOKEN + 1)
    vocabulary: Any = [[long, 0.0]] if as_list else {long: 0}
    with pytest.raises(CheckpointError, match="characters"):
        refuse_growth(folder_with(tmp_path, "tokenizer.json", {"model": {"vocab": vocabulary}}))
