"""What a checkpoint holds, from its config, its index and the headers of its files.

An index may name plain files of its own folder only, and nothing that the files' headers do not bear out. Nothing here
loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.files import MAX_HEADER, MAX_TENSORS, load_json, refuse_special
from vlmgraft.checkpoint.header import TensorInfo, read_header
from vlmgraft.errors import CheckpointError
from vlmgraft.records import collection_paused

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_LAYERS = 10_000
"""Decoder layers, vision layers or experts that a config may speak of."""


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
    if not is_folder(source):
        if folder.exists():
            raise CheckpointError(f"{folder}: is a file; give the folder that holds config.json and the weights")
        if isinstance(source, Path):
            raise CheckpointError(f"{folder}: no such folder")
        from vlmgraft.checkpoint.hub import fetch

        folder = fetch(source)
    refuse_special(folder)
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
        if len(found) > MAX_TENSORS:
            raise CheckpointError(f"{folder}: has more than {MAX_TENSORS:,} tensors; no model that is merged here has")
    for name, shard in weight_map.items():
        if name not in found:
            raise CheckpointError(
                f"{folder / INDEX}: says that {name} is in {shard}, which does not have it; download both again"
            )
    if not found:
        raise CheckpointError(f"{folder}: its safetensors hold no tensor")
    return Checkpoint(folder, found, files, read_config(folder))


def is_folder(source: str | Path) -> bool:
    """Whether a model is given as a folder that exists; raises CheckpointError where no file can be called so."""
    try:
        return Path(source).is_dir()
    except OSError as error:
        raise CheckpointError(
            f"{source!s:.120}: cannot be a folder ({error.strerror}); give a folder or hub id"
        ) from None


def _shards(folder: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The files that hold the weights, and the index's map from tensor to file name (empty without an index)."""
    if (folder / SINGLE).exists():
        return (folder / SINGLE,), {}
    if (folder / INDEX).exists():
        weight_map = _weight_map(folder / INDEX)
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


def _weight_map(index: Path) -> dict[str, str]:
    """The map from tensor to file of an index; every file is a plain name, to be found beside it."""
    again = "download the index again"
    weight_map = load_json(index, MAX_HEADER, strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map from tensors to files; {again}")
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{index}: weight_map has more than {MAX_TENSORS:,} tensors; no model merged here has")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index}: weight_map gives {name!r:.120} {shard!r:.60}, no file name; {again}")
    for shard, name in {shard: name for name, shard in weight_map.items()}.items():
        plain = Path(shard).name == shard and shard not in ("", "..") and not set(shard) & set("\\:")
        if not plain or not shard.isprintable() or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: weight_map says that {name!r:.120} is in {shard!r:.120}; only plain file names, of "
                f".safetensors beside the index, are followed; {again}"
            )
    return weight_map


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, {} without one. Its model types are names fit to be printed, its numbers of layers are those of a
    model: who builds one from it neither waits for ever nor runs out of memory.

    Raises:
        CheckpointError: naming the field.
    """
    file = folder / "config.json"
    config = load_json(file) if file.exists() else {}
    nested = {key: value for key, value in config.items() if isinstance(value, dict)}
    for place, part in (("", config), *((f"{key}.", value) for key, value in nested.items())):
        kind = part.get("model_type", "")
        if not isinstance(kind, str) or len(kind) > 100 or not kind.isprintable():
            raise CheckpointError(
                f"{file}: {place}model_type is {kind!r:.120}, which is no name; download config.json again"
            )
        for key in ("num_hidden_layers", "num_layers", "depth", "num_experts", "num_local_experts"):
            number = part.get(key, 0)
            if isinstance(number, int | float) and not 0 <= number <= MAX_LAYERS:
                raise CheckpointError(
                    f"{file}: {place}{key} is {number}, not up to {MAX_LAYERS}; download config.json again"
                )
    if not isinstance(config.get("text_config", {}), dict | None):
        raise CheckpointError(f"{file}: text_config is no mapping; download config.json again")
    return config
