"""How tensors are cut into safetensors files, and the files' headers; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmgraft.checkpoint.files import SINGLE
from vlmgraft.checkpoint.header import ITEM_SIZES

METADATA = {"format": "pt"}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written. dtype: safetensors code such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        size = ITEM_SIZES[self.dtype]
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Shard:
    """One file of the output: its name, tensors in order, header bytes and size."""

    name: str
    tensors: tuple[TensorSpec, ...]
    header: bytes
    size: int


def plan_shards(tensors: Sequence[TensorSpec], shard_size: int) -> tuple[Shard, ...]:
    """Cut the tensors, in their order, into files of at most `shard_size` bytes of data (one tensor at least)."""
    groups: dict[int, list[TensorSpec]] = {0: []}
    for tensor, number in zip(tensors, _numbers([tensor.nbytes for tensor in tensors], shard_size), strict=True):
        groups.setdefault(number, []).append(tensor)
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return tuple(_shard(name, group) for name, group in zip(names, groups.values(), strict=True))


def count_shards(sizes: Sequence[int], shard_size: int) -> int:
    """How many files `plan_shards` makes of tensors of these sizes in bytes."""
    return max(_numbers(sizes, shard_size), default=0) + 1


def _numbers(sizes: Sequence[int], shard_size: int) -> list[int]:
    """The number of the file that each tensor goes to."""
    numbers: list[int] = []
    filled = 0
    for size in sizes:
        number = numbers[-1] if numbers else 0
        if numbers and filled + size > shard_size:
            number, filled = number + 1, 0
        numbers.append(number)
        filled += size
    return numbers


def _shard(name: str, tensors: Sequence[TensorSpec]) -> Shard:
    header = header_of(tensors, METADATA)
    return Shard(name, tuple(tensors), header, len(header) + sum(tensor.nbytes for tensor in tensors))


def header_of(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """What stands before the data of a safetensors file with these tensors, one behind the other."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
