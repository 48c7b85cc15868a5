"""What the child of test_hub_emulator.py asks of the hub that HF_ENDPOINT names; prints one JSON object."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import _http

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


def tuned(**sources: str) -> dict[str, object]:
    """A fine-tuning of the trio on the hub; its traces are looked for after its models."""
    models = {"vlm": "lab/vlm", "donor": "lab/donor", "donor_base": "lab/base", **sources}
    return {**models, "data": {"train": "traces.jsonl"}}


def decomposed(**sources: str) -> dict[str, object]:
    """A recipe with factors."""
    return {**recipe(**sources), "method": "frism"}


def weights(source: str) -> str:
    """The digest of downloaded weights, after every source was asked for."""
    hub.check_access([source])
    return sha256((hub.fetch(source) / "model.safetensors").read_bytes()).hexdigest()


def main(folder: Path) -> dict[str, str]:
    """Every case in turn."""
    hub.PAUSES = (0.0, 0.0)
    # its client takes a 401 for "no such model" on https alone, and the emulator speaks http
    of_a_model = _http.REPO_API_REGEX
    _http.REPO_API_REGEX = re.compile(of_a_model.pattern.replace("https:", "https?:"), of_a_model.flags)
    (folder / "there").mkdir()
    (folder / "there" / "factors.json").touch()
    cases = {
        "output": lambda: vg.merge(recipe(vlm="lab/unasked"), folder / "there"),
        "output of tune": lambda: vg.tune(tuned(vlm="lab/unasked"), folder / "there"),
        "output of decompose": lambda: vg.decompose(decomposed(vlm="lab/unasked"), folder / "there"),
        "gated in tune": lambda: vg.tune(tuned(donor="lab/gated"), folder / "d"),
        "gated in decompose": lambda: vg.decompose(decomposed(donor="lab/gated"), folder / "e"),
        "gated, not logged in": lambda: vg.merge(recipe(donor="lab/terms"), folder / "f"),
        "private": lambda: vg.merge(recipe(donor="lab/private"), folder / "g"),
        "revoked": lambda: vg.tune(tuned(donor_base="lab/revoked"), folder / "h"),
        "gated": lambda: vg.merge(recipe(donor="lab/gated"), folder / "a"),
        "missing": lambda: vg.merge(recipe(donor="lab/missing"), folder / "b"),
        "revision": lambda: vg.merge(recipe(donor_base="lab/base@v9"), folder / "c"),
        "pickled": lambda: hub.fetch("lab/pickled"),
        "damaged": lambda: vg.inspect(recipe(donor="lab/damaged")),
        "limited": lambda: weights("lab/limited"),
        "dropped": lambda: weights("lab/dropped"),
        "cut": lambda: weights("lab/cut"),
        "same bytes": lambda: weights("lab/base"),
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
