"""Which token ids stand for different tokens in two checkpoints, from their tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmgraft.checkpoint.files import parse_json, read_small
from vlmgraft.checkpoint.hub import is_hub_id, small_file
from vlmgraft.errors import AlignmentError
from vlmgraft.storage.limits import MAX_TOKENIZER

if TYPE_CHECKING:
    from vlmgraft.checkpoint.index import Checkpoint

FILE = "tokenizer.json"
MOST = 0.1
"""Largest share of token ids that may differ; beyond it the tokenizers count as different, and no row pairs."""


@dataclass(frozen=True)
class Tokens:
    """How a checkpoint's tokenizer (`key` of the recipe) differs from the VLM's. other: id → (the VLM's token, its
    own). missing, extra: ids that only the VLM, or only the other, has. shared: the number of ids in both."""

    key: str
    other: dict[int, tuple[str, str]]
    missing: dict[int, str]
    extra: dict[int, str]
    shared: int

    @property
    def foreign(self) -> frozenset[int]:
        """Rows of the VLM's embeddings and head without a counterpart in the other checkpoint.

        Raises AlignmentError if more than `MOST` of the shared ids stand for other tokens.
        """
        if len(self.other) > MOST * self.shared:
            number, (ours, theirs) = next(iter(self.other.items()))
            raise AlignmentError(
                f"{self.key}: {len(self.other)} of {self.shared} tokens are others than the VLM's ({number} is "
                f"{ours!r:.60} in the VLM, {theirs!r:.60} there), so rows do not pair; leave embeddings and head out "
                "of modules"
            )
        return frozenset((*self.other, *self.missing))

    def notes(self) -> Iterator[str]:
        """Notes for the user about the differences."""
        if self.other:
            number, (ours, theirs) = next(iter(self.other.items()))
            yield (
                f"warning: token {number} is {ours!r:.60} in the VLM, {theirs!r:.60} in {self.key}"
                f"{_more(self.other)}: prompts reach the merged weights with the VLM's tokens"
            )
        for tokens, who in ((self.missing, "the VLM"), (self.extra, self.key)):
            if tokens:
                number, token = next(iter(tokens.items()))
                yield f"only {who}'s tokenizer has token {number}, {token!r:.60}{_more(tokens)}"


def compare_tokens(vlm: Checkpoint, other: Checkpoint, key: str) -> Tokens | None:
    """Compare the tokenizers of the VLM and another checkpoint; None if one of them has no tokenizer.json.

    Raises CheckpointError if a tokenizer.json is not valid JSON.
    """
    raws = [_raw(checkpoint) for checkpoint in (vlm, other)]
    if None in raws:
        return None
    if raws[0] == raws[1]:
        return Tokens(key, {}, {}, {}, 0)
    ours, theirs = (_by_number(parse_json(raw or b"", f"{one.path}/{FILE}:", strict=False))
                    for raw, one in zip(raws, (vlm, other), strict=True))  # fmt: skip
    shared = sorted(ours.keys() & theirs.keys())
    other_tokens = {number: (ours[number], theirs[number]) for number in shared if ours[number] != theirs[number]}
    missing, extra = (
        {number: one[number] for number in sorted(one.keys() - two.keys())}
        for one, two in ((ours, theirs), (theirs, ours))
    )
    return Tokens(key, other_tokens, missing, extra, len(shared))


def _raw(checkpoint: Checkpoint) -> bytes | None:
    """The bytes of a checkpoint's tokenizer.json (for an adapter without one, its base's), or None."""
    files = [folder / FILE for folder in (checkpoint.path, checkpoint.adapter_of) if folder is not None]
    if is_hub_id(checkpoint.path) and (found := small_file(str(checkpoint.path), FILE)):
        files = [found]
    file = next((file for file in files if file.is_file()), None)
    return None if file is None else read_small(file, MAX_TOKENIZER)


def _by_number(tokenizer: dict[str, Any]) -> dict[int, str]:
    """Token id → token, of the vocabulary and the added tokens."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    entries = model.get("vocab") if isinstance(model, dict) else None
    found: dict[int, str] = {}
    if isinstance(entries, dict):
        found = {number: token for token, number in entries.items() if isinstance(number, int)}
    elif isinstance(entries, list):  # a unigram model lists tokens with scores
        found = {number: str(entry[0]) for number, entry in enumerate(entries) if isinstance(entry, list) and entry}
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            found[entry["id"]] = str(entry.get("content"))
    return found


def _more(tokens: dict[int, Any]) -> str:
    return f" (and {len(tokens) - 1} more)" if len(tokens) > 1 else ""
