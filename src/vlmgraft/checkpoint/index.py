"""What a checkpoint holds, from its headers alone: names, dtypes, shapes and where the bytes lie.

Everything a header claims is checked against the file before anyone relies on it: lengths, offsets, overlaps, dtypes,
and that an index names only plain files of its own folder. Nothing here loads torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlmgraft.errors import CheckpointError
from vlmgraft.records import collection_paused

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000
"""The limit that the safetensors library sets on its header."""

ITEM_SIZES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
    "BOOL": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
}
"""Bytes per element of each safetensors dtype that is read; dtypes below one byte are refused."""

LARGEST = 1 << 63
"""Sizes and offsets are below: what a file can have."""


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


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors: its tensors in disk order (shard order, then offset), its files, its config.json."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    config: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


@collection_paused()
def open_checkpoint(source: str | Path) -> Checkpoint:
    """Index a local folder, or download a hub id (`organisation/name`, optionally `@revision`) and index that.

    A text that names an existing folder is that folder. A Path is never a hub id.

    Raises:
        CheckpointError: no such folder or model; pickled weights only; a shard that is missing, truncated or lies about
            its content; an index that names an absent tensor or a file outside the folder; an unknown dtype.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists():
            raise CheckpointError(f"{folder}: is a file; give the folder that holds config.json and the weights")
        if isinstance(source, Path):
            raise CheckpointError(f"{folder}: no such folder")
        from vlmgraft.checkpoint.hub import fetch

        folder = fetch(source)
    files, weight_map = _shards(folder)
    found: dict[str, TensorInfo] = {}
    for file in files:
        shard = file.name
        for name, info in read_header(file).items():
            if weight_map.get(name, shard) != shard:
                continue  # the index gives this name to another shard: that one counts
            if name in found:
                raise CheckpointError(f"{name}: in {found[name].file.name} and in {file.name} of {folder}; keep one")
            found[name] = info
    for name, shard in weight_map.items():
        if name not in found:
            raise CheckpointError(f"{folder / INDEX}: says that {name} is in {shard}, which does not have it")
    if not found:
        raise CheckpointError(f"{folder}: its safetensors hold no tensor")
    return Checkpoint(folder, found, files, _config(folder))


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file in the order of their bytes; raises CheckpointError where it lies."""
    raw, start, size = _raw_header(file)
    tensors = [_entry(file, name, entry, start) for name, entry in raw.items() if name != "__metadata__"]
    tensors.sort(key=lambda info: (info.begin, info.nbytes))
    end, before = start, "the header"
    for info in tensors:
        if info.begin < end:
            raise CheckpointError(f"{file}: {info.name} begins at byte {info.begin}, inside {before} (ends at {end})")
        end, before = info.begin + info.nbytes, info.name
        if end > size:
            raise CheckpointError(
                f"{file}: truncated: {info.name} ends at byte {end}, the file at {size}; download it again"
            )
    if end < size:
        raise CheckpointError(f"{file}: {size - end} bytes after the last tensor ({before}); not a safetensors file")
    return {info.name: info for info in tensors}


def _raw_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, the offset of the data and the size of the file."""
    try:
        with file.open("rb") as handle:
            size = file.stat().st_size
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(
                    f"{file}: {size} bytes with a header of {length}: truncated, or not a safetensors file "
                    "(a git-lfs pointer is such a file; fetch the real one)"
                )
            raw = json.loads(handle.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: its header is {type(raw).__name__}, not a mapping of tensors")
    return raw, 8 + length, size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys must differ."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} twice")
    return made


def _entry(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """One tensor of a header; its length must be what dtype and shape say, its name fit to be printed."""
    if not name or not name.isprintable():
        raise CheckpointError(f"{file}: a tensor's name is {name!r:.120}; rename it to printable characters")
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{file}: {name} has no proper dtype, shape and data_offsets: {entry!r:.120}") from None
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(f"{file}: {name} has dtype {dtype!r}; known are {', '.join(ITEM_SIZES)}")
    said = f"{list(shape)!s:.120}"
    if not all(type(number) is int and 0 <= number < LARGEST for number in (begin, end, *shape)):
        raise CheckpointError(f"{file}: {name} has shape {said} and offsets {f'[{begin}, {end}]':.120}")
    nbytes = 0 if 0 in shape else ITEM_SIZES[dtype]
    for number in shape:
        nbytes *= number
        if nbytes >= LARGEST:
            raise CheckpointError(
                f"{file}: {name} is {dtype} {said}, more than a file can hold, but spans {end - begin}"
            )
    if end - begin != nbytes:
        raise CheckpointError(f"{file}: {name} is {dtype} {said}, {nbytes} bytes, but spans {end - begin}")
    return TensorInfo(name, dtype, shape, file, start + begin, nbytes)


def _shards(folder: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The files that hold the weights, and the index's map from tensor to file name (empty without an index)."""
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,), {}
    if (folder / INDEX).is_file():
        weight_map = _load_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX}: has no weight_map")
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX}: its weight_map gives a tensor something that is no file name")
        for shard, name in {shard: name for name, shard in weight_map.items()}.items():
            if Path(shard).name != shard or shard in ("", "..") or "\\" in shard:
                raise CheckpointError(f"{folder / INDEX}: {name} is in {shard!r}; only plain file names are followed")
        files = tuple(folder / shard for shard in sorted(set(weight_map.values())))
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file}: missing, but {INDEX} names it; download the checkpoint again")
        return files, weight_map
    single = sorted(folder.glob("*.safetensors"))
    if len(single) == 1 and "-of-" not in single[0].name:
        return (single[0],), {}
    if single:
        raise CheckpointError(f"{folder}: {len(single)} safetensors files without {INDEX}; download the index too")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise CheckpointError(
            f"{folder}: has pickled weights only, which can run code and are not read. Convert them once with "
            f'`python -c "from transformers import AutoModel; '
            f"AutoModel.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\"`"
        )
    raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}; give the folder of a checkpoint")


def _config(folder: Path) -> dict[str, Any]:
    return _load_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _load_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not a mapping")
    return value
