"""Checkpoints of the hub as sparse files: `tests/replicas/*.json` hold config, name patterns and shapes, no weights.

In a pattern `{0-27}` stands for the numbers 0 to 27 and `{q,o}` for either word; several braces multiply.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.header import TensorSpec, plan_shards

REPLICAS = Path(__file__).with_name("replicas")


def replicas() -> dict[str, dict[str, Any]]:
    """What is known of each hub id."""
    files = [json.loads(path.read_text()) for path in sorted(REPLICAS.glob("*.json"))]
    return {name: replica for replica in files for name in replica["hub"]}


def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for."""
    pieces: list[list[str]] = []
    for text, inside in re.findall(r"([^{]+)|\{([^}]*)\}", pattern):
        numbers = re.fullmatch(r"(\d+)-(\d+)", inside)
        if numbers:
            pieces.append([str(number) for number in range(int(numbers[1]), int(numbers[2]) + 1)])
        else:
            pieces.append([text] if text else inside.split(","))
    return ["".join(parts) for parts in itertools.product(*pieces)]


def shapes_of(replica: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape; a name that two patterns give is a mistake in the replica."""
    pairs = [(name, tuple(shape)) for pattern, shape in replica["tensors"].items() for name in expand(pattern)]
    shapes = dict(pairs)
    assert len(shapes) == len(pairs), f"{replica['hub'][0]}: a name twice"
    return shapes


def weights_in(replica: dict[str, Any]) -> int:
    """How many numbers its tensors hold."""
    return sum(math.prod(shape) for shape in shapes_of(replica).values())


def make(replica: dict[str, Any], folder: Path) -> Path:
    """The checkpoint: true headers, and files of the true size that are holes."""
    folder.mkdir(parents=True)
    specs = [TensorSpec(name, replica["dtype"], shape) for name, shape in shapes_of(replica).items()]
    shards = plan_shards(specs, 5 * 10**9)
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
    if len(shards) > 1:
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(replica["config"]))
    return folder
