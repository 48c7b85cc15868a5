"""The content of one safetensors file from its header alone: names, dtypes, shapes and byte offsets.

Also the division of tensors into shards, and the shards' headers.

Everything a header claims is checked against the file before it is used: lengths, offsets, overlaps, holes, dtypes,
names. Nothing here loads torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlmgraft.checkpoint.files import SINGLE, open_regular, parse_json
from vlmgraft.errors import CheckpointError
from vlmgraft.storage.limits import MAX_HEADER, MAX_TENSOR_NAME

ITEM_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "C64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL", "I8", "U8"), 1),
}
"""Bytes per element of each safetensors dtype that is read; dtypes below one byte are refused."""

LARGEST = 1 << 63
"""Sizes and offsets must be below this limit of a file's size."""
_AGAIN = "its header lies: download it again, or write it anew with safetensors"


class TensorInfo(NamedTuple):
    """One tensor on disk. dtype: safetensors code such as "BF16". begin: absolute byte offset in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


QUANTISED = {"F8_E4M3": "1/16 of itself", "F8_E5M2": "1/8 of itself", "I8": "1/255 of the largest in its group"}
"""Dtypes of quantised values, and the largest rounding error of each: half a step."""


@dataclass(frozen=True)
class Packed:
    """One matrix stored as several tensors. parts: "values", and if on disk "scale", "zero_point", "g_idx". block:
    (rows, columns) that share a scale, if the config gives it. bits: per value, if values are packed into int32. unit:
    factor of every scale."""

    parts: Mapping[str, TensorInfo]
    block: tuple[int, int] | None = None
    bits: int | None = None
    unit: float = 1.0

    @property
    def error(self) -> str:
        """The largest rounding error of a value, in words."""
        if self.bits is not None:
            return f"1/{2**self.bits - 1} of the largest in its group"
        return QUANTISED.get(self.parts["values"].dtype, "1/6 of the largest in its block")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file in the order of their bytes; raises CheckpointError if the header is wrong."""
    raw, start, size = _raw_header(file)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: its __metadata__ is no mapping of texts; write the file anew with safetensors")
    tensors = [_entry(file, name, entry, start) for name, entry in raw.items()]
    tensors.sort(key=lambda info: (info.begin, info.nbytes))
    end, before = start, "the header"
    for info in tensors:
        if info.begin + info.nbytes > size:
            raise CheckpointError(
                f"{file}: truncated: {info.name} ends at byte {info.begin + info.nbytes}, the file at {size}; "
                "download it again"
            )
        if info.begin != end:
            where = f"inside {before}, which ends" if info.begin < end else f"with a hole behind {before}, which ends"
            raise CheckpointError(f"{file}: {info.name} begins at byte {info.begin}, {where} at {end}; {_AGAIN}")
        end, before = info.begin + info.nbytes, info.name
    if end < size:
        raise CheckpointError(f"{file}: {size - end} bytes after the last tensor ({before}); {_AGAIN}")
    return {info.name: info for info in tensors}


def _raw_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, the offset of the data and the size of the file."""
    try:
        with open_regular(file) as handle:
            size = os.fstat(handle.fileno()).st_size
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(
                    f"{file}: {size} bytes with a header of {length}: truncated, or not a safetensors file (a git-lfs "
                    "pointer is such a file); download the real one"
                )
            text = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); download it again") from None
    return parse_json(text, f"{file}: its header"), 8 + length, size


def is_name(name: str) -> bool:
    """Whether a tensor's name is printable, not too long, and a plain file name."""
    length = len(name.encode("utf-8", "replace"))
    return 0 < length <= MAX_TENSOR_NAME and name.isprintable() and not set(name) & set("/\\")


def _entry(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """One tensor of a header; its name must be printable, and its length must agree with dtype and shape."""
    if not is_name(name):
        raise CheckpointError(
            f"{file}: a tensor's name is {name!r:.120}; rename it to 1 to {MAX_TENSOR_NAME} printable characters "
            "without slashes"
        )
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{file}: {name} has no proper dtype, shape and data_offsets: {entry!r:.120}; {_AGAIN}"
        ) from None
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(
            f"{file}: {name} has dtype {dtype!r:.60}; known are {', '.join(ITEM_SIZES)}: take a release in one of them"
        )
    shown = f"{list(shape)!s:.120}"
    if not all(type(number) is int and 0 <= number < LARGEST for number in (begin, end, *shape)):
        raise CheckpointError(
            f"{file}: {name} has shape {shown} and data_offsets {f'[{begin}, {end}]':.120}, not whole numbers; {_AGAIN}"
        )
    nbytes = 0 if 0 in shape else ITEM_SIZES[dtype]
    for number in shape:
        nbytes *= number
        if nbytes >= LARGEST:
            raise CheckpointError(
                f"{file}: {name} is {dtype} {shown}, more than a file can hold, but spans {end - begin}; {_AGAIN}"
            )
    if end - begin != nbytes:
        raise CheckpointError(f"{file}: {name} is {dtype} {shown}, {nbytes} bytes, but spans {end - begin}; {_AGAIN}")
    return TensorInfo(name, dtype, shape, file, start + begin, nbytes)


METADATA = {"format": "pt"}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written. dtype: safetensors code such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return ITEM_SIZES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One file of the output: its name, tensors in order, header bytes and size."""

    name: str
    tensors: tuple[TensorSpec, ...]
    header: bytes
    size: int


def plan_shards(tensors: Sequence[TensorSpec], shard_size: int) -> tuple[Shard, ...]:
    """Split the tensors, in their order, into files of at most `shard_size` bytes of data, but at least one tensor."""
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
    """The bytes before the data of a safetensors file that holds these tensors without gaps."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
