"""Tokenizers are compared by number: what means something else is named, and its rows of embeddings stay the VLM's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmgraft.alignment import align
from vlmgraft.alignment.tokens import MOST, Tokens, compare_tokens
from vlmgraft.checkpoint.index import Checkpoint, open_checkpoint
from vlmgraft.errors import AlignmentError
from vlmgraft.pipeline import inspect, merge

Edit = Callable[[dict[str, Any]], None]


def copied(trio: Path, out: Path, **edits: Edit) -> dict[str, Any]:
    """A recipe of the trio's copies, with tokenizers edited by role."""
    for role in ("vlm", "donor", "base"):
        shutil.copytree(trio / role, out / role)
        file = out / role / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        edits.get(role, lambda tokenizer: None)(tokenizer)
        file.write_text(json.dumps(tokenizer))
    return {"vlm": str(out / "vlm"), "donor": str(out / "donor"), "donor_base": str(out / "base"),
            "method": {"name": "task_arithmetic", "scale": 1.0}}  # fmt: skip


def renamed(*numbers: int) -> Edit:
    def edit(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        tokens = {number: token for token, number in vocabulary.items()}
        for number in numbers:
            del vocabulary[tokens[number]]
            vocabulary[f"<other {number}>"] = number
            tokenizer["added_tokens"] = [one for one in tokenizer["added_tokens"] if one["id"] != number]

    return edit


def removed(number: int) -> Edit:
    def edit(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {token: one for token, one in vocabulary.items() if one != number}
        tokenizer["added_tokens"] = [one for one in tokenizer["added_tokens"] if one["id"] != number]

    return edit


def test_equal_tokenizers_give_no_note(trio: Path, tmp_path: Path) -> None:
    assert not any("token" in note for note in inspect(copied(trio, tmp_path)).notes)


def test_other_and_missing_tokens_are_named(trio: Path, tmp_path: Path) -> None:
    notes = inspect(copied(trio, tmp_path, donor=renamed(20, 21), base=removed(22))).notes
    (other,) = [note for note in notes if note.startswith("warning: token 20 is")]
    assert "'<other 20>' in donor (and 1 more)" in other
    assert any(note.startswith("only the VLM's tokenizer has token 22") for note in notes)


@pytest.mark.parametrize("method", [{"name": "task_arithmetic", "scale": 1.0}, {"name": "linear", "vlm_weight": 0.5}])
def test_rows_of_other_tokens_stay_the_vlms(method: dict[str, Any], trio: Path, tmp_path: Path) -> None:
    recipe = copied(trio, tmp_path, donor=renamed(20), base=removed(22)) | {"modules": ["embeddings"], "method": method}
    if method["name"] == "linear":
        recipe.pop("donor_base")
    donor = load_file(tmp_path / "donor" / "model.safetensors")
    name = next(name for name in donor if "embed_tokens" in name)
    donor[name] = donor[name] + 1  # so that every row that may move does
    save_file(donor, tmp_path / "donor" / "model.safetensors", metadata={"format": "pt"})
    before = load_file(tmp_path / "vlm" / "model.safetensors")
    merge(recipe, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    (name,) = [name for name in before if "embed_tokens" in name]
    same = {row for row in range(len(before[name])) if torch.equal(before[name][row], after[name][row])}
    shared = min(len(before[name]), len(donor[next(iter(key for key in donor if "embed_tokens" in key))]))
    kept = {20, 22} if method["name"] == "task_arithmetic" else {20}
    assert same == kept | set(range(shared, len(before[name])))


def test_another_tokenizer_merges_no_embeddings(trio: Path, tmp_path: Path) -> None:
    recipe = copied(trio, tmp_path, donor=renamed(*range(20, 60)))
    opened = [open_checkpoint(recipe[key]) for key in ("vlm", "donor", "donor_base")]
    assert align(*opened).merged
    with pytest.raises(AlignmentError, match=r"donor: 40 of \d+ tokens are others.*leave embeddings and head out"):
        align(*opened, modules=["all", "embeddings"])


def tokenized(folder: Path, tokenizer: dict[str, Any] | None) -> Checkpoint:
    folder.mkdir()
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return Checkpoint(folder, {}, (), {})


def test_vocabularies_of_both_kinds_and_what_was_added_are_compared_by_number(tmp_path: Path) -> None:
    """A mapping from tokens, and a unigram model's list with scores; what was added stands over both."""
    plain = tokenized(tmp_path / "a", {"model": {"vocab": {"x": 0, "y": 1, "z": 2}}})
    listed = {"model": {"vocab": [["x", -1.0], ["q", -2.0]]}, "added_tokens": [{"id": 3, "content": "<new>"}]}
    other = tokenized(tmp_path / "b", listed)
    assert compare_tokens(plain, other, "donor") == Tokens("donor", {1: ("y", "q")}, {2: "z"}, {3: "<new>"}, 2)
    assert compare_tokens(other, plain, "donor") == Tokens("donor", {1: ("q", "y")}, {3: "<new>"}, {2: "z"}, 2)
    assert compare_tokens(plain, plain, "donor") == Tokens("donor", {}, {}, {}, 0)
    assert compare_tokens(plain, tokenized(tmp_path / "c", None), "donor") is None


def test_rows_without_a_counterpart_are_those_of_other_and_missing_tokens() -> None:
    """A tenth may be others; with one more it is another tokenizer."""
    others = dict.fromkeys(range(10), ("a", "b"))
    assert Tokens("donor", others, {200: "c"}, {300: "d"}, int(10 / MOST)).foreign == {*range(10), 200}
    with pytest.raises(AlignmentError, match="donor: 10 of 99 tokens are others"):
        _ = Tokens("donor", others, {}, {}, int(10 / MOST) - 1).foreign
