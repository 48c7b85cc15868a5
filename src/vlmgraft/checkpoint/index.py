"""What a checkpoint folder holds, from the headers of its safetensors files alone: names, dtypes, shapes, offsets.

Everything that can be wrong with a folder is found here, before any weight is read: missing or truncated shards, an
index that names an absent tensor or a path outside the folder, headers that lie about their offsets. No torch.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmgraft.errors import CheckpointError

ITEM_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LARGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: dtype as a safetensors code, `begin` as the absolute byte offset in `file`."""

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
    """A folder's tensors in disk order (shard by shard, then by offset), its weight files and its config.json."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


def open_checkpoint(source: str | Path, *, headers_only: bool = False) -> Checkpoint:
    """Read the headers of a local folder, or of a hub id with optional @revision when no such folder exists.

    Args:
        headers_only: of a hub id read only the headers, by range requests; its weights cannot be read afterwards.
    Raises:
        CheckpointError: naming the file, the tensor and the remedy.
    """
    folder = Path(source)
    if not folder.exists():
        from vlmgraft.checkpoint import hub

        if headers_only:
            return hub.remote_headers(str(source))
        folder = hub.fetch(str(source))
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; give the folder that holds config.json and *.safetensors")
    files, weight_map = _weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in read_header(file):
            if info.name in tensors:
                raise CheckpointError(f"{file}: tensor {info.name} is also in {tensors[info.name].file.name}")
            tensors[info.name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(
                f"{folder / INDEX_FILE}: names {name} in {shard}, which does not hold it; download again"
            )
    return Checkpoint(
        folder, tensors, files, _read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    )


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file by offset; raises CheckpointError when header and size do not agree."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            prefix = handle.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(LARGEST_HEADER, size - 8):
                raise CheckpointError(f"{file}: truncated or no safetensors file ({size} bytes); download it again")
            raw = json.loads(handle.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header is not valid JSON ({error}); download it again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: its header is not a mapping; download it again")
    start = 8 + length
    infos = [_tensor_info(file, name, value, start) for name, value in raw.items() if name != "__metadata__"]
    infos.sort(key=lambda info: (info.begin, info.nbytes))
    end = start
    for info in infos:
        if info.begin != end:
            raise CheckpointError(f"{file}: {info.name} overlaps another tensor or leaves a hole at byte {info.begin}")
        end += info.nbytes
    if end != size:
        raise CheckpointError(
            f"{file}: truncated: its tensors end at byte {end}, the file at {size}; download it again"
        )
    return infos


def _tensor_info(file: Path, name: str, value: Any, start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{file}: {name}: its header entry lacks dtype, shape or data_offsets") from None
    if dtype not in ITEM_BITS:
        raise CheckpointError(f"{file}: {name}: dtype {dtype!r} is not read; known: {', '.join(ITEM_BITS)}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise CheckpointError(f"{file}: {name}: shape {list(shape)} or offsets {[begin, end]} are no natural numbers")
    nbytes = math.prod(shape) * ITEM_BITS[dtype] // 8
    if end - begin != nbytes:
        raise CheckpointError(
            f"{file}: {name}: {dtype} {list(shape)} needs {nbytes} bytes, the header gives {end - begin}"
        )
    return TensorInfo(name, dtype, shape, file, start + begin, nbytes)


def _weight_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The shards of a folder, by the index when there is one, and the index's map."""
    index = folder / INDEX_FILE
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no weight_map; download it again")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
                raise CheckpointError(f"{index}: {name} lies in {shard!r}, which is no file name inside the folder")
        files = tuple(folder / shard for shard in sorted(set(weight_map.values())))
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file}: missing, though {INDEX_FILE} names it; download it again")
        return files, weight_map
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,), {}
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        return (shards[0],), {}
    if shards:
        raise CheckpointError(f"{folder}: has {len(shards)} safetensors files but no {INDEX_FILE}; download the index")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: pickled weights are not read, since loading them can run code. Convert them once: "
            f"python -c \"from transformers import AutoModel as M; M.from_pretrained('{folder}').save_pretrained('OUT')\""
        )
    raise CheckpointError(f"{folder}: holds no *.safetensors")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not a mapping")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name stands twice")
    return mapping
