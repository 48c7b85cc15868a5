"""What the child of test_hub_emulator.py asks of the hub that HF_ENDPOINT names; prints one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import constants

import vlmgraft as vg
from vlmgraft.checkpoint import hub
from vlmgraft.errors import VlmgraftError


def outcome(call: Callable[[], object]) -> str:
    """What a call gives, as a text, or the error's message."""
    try:
        return f"{call()}"
    except VlmgraftError as error:
        return f"refused: {error}"


def recipe(**sources: str) -> dict[str, object]:
    """A merge of the trio on the hub, with other sources where named."""
    models = {"vlm": "lab/vlm", "donor": "lab/donor", "donor_base": "lab/base", **sources}
    return {**models, "method": {"name": "task_arithmetic"}}


def main(folder: Path) -> dict[str, str]:
    """Every case in turn."""
    hub.PAUSES = (0.0, 0.0)
    (folder / "there").mkdir()
    cases = {
        "output": lambda: vg.merge(recipe(), folder / "there"),
        "gated": lambda: vg.merge(recipe(donor="lab/gated"), folder / "a"),
        "missing": lambda: vg.merge(recipe(donor="lab/missing"), folder / "b"),
        "revision": lambda: vg.merge(recipe(donor_base="lab/base@v9"), folder / "c"),
        "pickled": lambda: hub.fetch("lab/pickled"),
        "damaged": lambda: vg.inspect(recipe(donor="lab/damaged")),
        "headers": lambda: vg.inspect(recipe()).merged,
        "merged": lambda: len(vg.merge(recipe(vlm="lab/busy"), folder / "merged").tensors),
    }
    results = {name: outcome(call) for name, call in cases.items()}
    constants.HF_HUB_OFFLINE = True
    results["offline"] = outcome(lambda: vg.inspect(recipe(vlm="lab/busy")).merged)
    results["offline, not cached"] = outcome(lambda: vg.inspect(recipe(vlm="lab/vlm2")).merged)
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
