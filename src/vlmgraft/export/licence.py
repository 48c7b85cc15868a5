"""The base model and the licence that a model card states, and the licence of a merged model.

A checkpoint states its licence in its card (`license:` in the head of README.md) or by a LICENSE file of a known text.
If all checkpoints state the same licence, it is the merged model's too. Different licences are never reconciled here:
the card then says `other` and names each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmgraft.storage.yaml_text import parse_yaml

TEXTS = {
    "Apache License": "apache-2.0", "MIT License": "mit", "BSD 3-Clause": "bsd-3-clause",
    "LLAMA 2 COMMUNITY": "llama2", "META LLAMA 3 COMMUNITY": "llama3", "LLAMA 3.1 COMMUNITY": "llama3.1",
    "LLAMA 3.2 COMMUNITY": "llama3.2", "LLAMA 3.3 COMMUNITY": "llama3.3", "Gemma Terms of Use": "gemma",
}  # fmt: skip
"""Words in the first lines of a licence's text, and the licence's identifier on the hub."""
HEAD = 100_000
"""Characters of a card or a licence that are read."""


def card_head(folder: Path) -> dict[str, Any]:
    """The YAML head of a folder's README.md; {} where there is none or it cannot be read."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            text = file.read(HEAD)
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.S)
        head = parse_yaml(match[1]) if match else None
    except (OSError, ValueError):
        return {}
    return head if isinstance(head, dict) else {}


def stated_licence(folder: Path) -> str | None:
    """The licence that a checkpoint's folder states, by the hub's identifier (for `other`, its name), or None."""
    head = card_head(folder)
    stated = head.get("license")
    if isinstance(stated, str):
        name = head.get("license_name")
        return name if stated == "other" and isinstance(name, str) else stated
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        try:
            with (folder / name).open(encoding="utf-8", errors="replace") as file:
                text = file.read(400)
        except OSError:
            continue
        return next((licence for words, licence in TEXTS.items() if words.lower() in text.lower()), None)
    return None


def merged_licence(stated: Mapping[str, str | None]) -> tuple[dict[str, str], str]:
    """The licence entries of the card's head, and a sentence about them.

    Args:
        stated: by model, what `stated_licence` gives.
    """
    known = sorted({licence for licence in stated.values() if licence})
    silent = [model for model, licence in stated.items() if not licence]
    if silent:
        models = ", ".join(f"`{model}`" for model in silent)
        return {}, (
            f"No licence is given here, because none is stated in the folder of {models}. "
            "Look it up, and add `license:` to the head of this card before you publish it."
        )
    if len(known) == 1:
        return {"license": known[0]}, f"Every model whose weights are in it states the licence {known[0]}."
    named = "; ".join(f"`{model}`: {licence}" for model, licence in stated.items())
    return (
        {"license": "other", "license_name": "-and-".join(known)},
        f"The licences differ and were not reconciled ({named}). The terms of each apply to what comes from it.",
    )


def stated_base(model: str) -> str | None:
    """The base model that a model's card names, if it names exactly one, for a local folder or for a hub id (its card
    is downloaded); None without a card or network."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import errors, hf_hub_download

        name, _, revision = model.partition("@")
        try:
            folder = Path(hf_hub_download(name, "README.md", revision=revision or None)).parent
        except (OSError, ValueError, *errors.HfHubHTTPError.__bases__):
            return None
    base = card_head(folder).get("base_model")
    bases = [base] if isinstance(base, str) else base
    return bases[0] if isinstance(bases, list) and len(bases) == 1 and isinstance(bases[0], str) else None
