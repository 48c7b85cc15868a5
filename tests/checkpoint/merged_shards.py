"""The lab's merge in several shards, and whose a byte of it is."""

from __future__ import annotations

import json
from pathlib import Path

import vlmgraft as vg


def merge_in_shards(trio: Path, out: Path) -> Path:
    """The lab's merge in several shards."""
    models = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    recipe = {**models, "method": {"name": "task_arithmetic"}, "output": {"shard_size": "300KB"}}
    vg.merge(recipe, out)
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


def owner(file: Path, place: int) -> str | None:
    """The tensor that byte `place` of a file belongs to, by the safetensors header read naively."""
    if file.suffix != ".safetensors":
        return None
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    ends = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return next((name for name, (begin, end) in ends.items() if begin <= place - start < end), None)
