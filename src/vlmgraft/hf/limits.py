"""Refusal of tokenizers and generation configs that ask for more than a model needs, from their files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.files import load_json
from vlmgraft.errors import CheckpointError
from vlmgraft.storage.limits import MAX_BEAMS, MAX_TEXT_GROWTH, MAX_TOKEN, MAX_TOKENIZER

_COUNTS = ("num_beams", "num_beam_groups", "num_return_sequences", "num_assistant_tokens", "prompt_lookup_num_tokens")


def refuse_growth(folder: Path) -> None:
    """Raise CheckpointError if a tokenizer lets texts grow without bound, or a generation config asks for millions of
    sequences."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        config = load_json(file) if file.is_file() else {}
        for key in _COUNTS:
            number = config.get(key)
            if isinstance(number, int | float) and not 0 <= number <= MAX_BEAMS:
                raise CheckpointError(f"{file}: {key} is {number}, not up to {MAX_BEAMS}; remove the entry")
    file = folder / "tokenizer.json"
    if file.is_file():
        _refuse_tokenizer(file, load_json(file, MAX_TOKENIZER))


def _refuse_tokenizer(file: Path, tokenizer: dict[str, Any]) -> None:
    growth = 1
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        for step in _steps(tokenizer.get(part)):
            added = step.get("content", step.get("prepend", ""))
            if step.get("type") in ("Replace", "Prepend") and isinstance(added, str):
                growth *= max(1, len(added))
            if growth > MAX_TEXT_GROWTH:
                raise CheckpointError(
                    f"{file}: {part} makes a text more than {MAX_TEXT_GROWTH} times as long; take another release"
                )
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    for token in vocabulary or ():
        text = token[0] if isinstance(token, list) and token else token
        if isinstance(text, str) and len(text) > MAX_TOKEN:
            raise CheckpointError(
                f"{file}: a token has {len(text):,} characters; at most {MAX_TOKEN:,}; take another release"
            )


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """All steps of a part of a tokenizer, including those inside sequences."""
    if isinstance(part, dict):
        yield part
        for value in part.values():
            for step in value if isinstance(value, list) else ():
                yield from _steps(step)
