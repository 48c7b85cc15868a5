"""Tensors are cut into files in their order, by size; headers are those of the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from vlmgraft.checkpoint.shards import TensorSpec, count_shards, header_of, plan_shards

SPECS = [TensorSpec(name, "F32", (size,)) for name, size in zip("abcd", (2, 2, 5, 0), strict=True)]


@pytest.mark.parametrize(
    ("size", "groups"),
    [(1, ["a", "b", "c", "d"]), (16, ["ab", "c", "d"]), (20, ["ab", "cd"]), (35, ["ab", "cd"]), (36, ["abcd"])],
)
def test_files_are_filled_in_order(size: int, groups: list[str]) -> None:
    shards = plan_shards(SPECS, size)
    assert ["".join(tensor.name for tensor in shard.tensors) for shard in shards] == groups
    assert count_shards([spec.nbytes for spec in SPECS], size) == len(groups)
    first = f"model-00001-of-0000{len(groups)}.safetensors"
    assert shards[0].name == ("model.safetensors" if len(groups) == 1 else first)


def test_the_library_reads_the_header(tmp_path: Path) -> None:
    header = header_of(SPECS, {"format": "pt"})
    assert len(header) % 8 == 0
    (tmp_path / "file").write_bytes(header + bytes(36))
    with safe_open(tmp_path / "file", "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes == {"a": [2], "b": [2], "c": [5], "d": [0]}
