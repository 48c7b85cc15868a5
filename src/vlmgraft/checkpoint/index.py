"""The content of a checkpoint, from its config, its index and the headers of its files.

An index may only name plain files in its own folder, and must agree with the files' headers. Nothing here loads torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint import adapter
from vlmgraft.checkpoint.files import INDEX, load_json, open_regular, refuse_special
from vlmgraft.checkpoint.folder import is_adapter, is_folder, pickled, weight_files
from vlmgraft.checkpoint.ggml import SUFFIX, gguf_tensors
from vlmgraft.checkpoint.header import Packed, TensorInfo, read_header
from vlmgraft.checkpoint.hub import (
    NoSafetensorsError,
    UnreachableError,
    cached_folder,
    explained,
    fetch,
    is_hub_id,
    retried,
    split_id,
)
from vlmgraft.checkpoint.packed import seen_whole
from vlmgraft.errors import CheckpointError
from vlmgraft.storage.limits import MAX_JSON, MAX_LAYERS, MAX_TENSORS
from vlmgraft.storage.resources import collection_paused


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors: its tensors in disk order (shard order, then offset), its files, its config.json.

    stamps: size and modification time of each file, taken before its header was read; () for a checkpoint on the hub.
    packed: the storage of quantised and adapted tensors; `tensors` lists them as they are read.
    adapter_of: the base's folder, if this one holds an adapter.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    config: dict[str, Any]
    stamps: tuple[tuple[int, int], ...] = ()
    packed: Mapping[str, Packed] = field(default_factory=dict)
    adapter_of: Path | None = None

    @cached_property
    def stored(self) -> dict[str, TensorInfo]:
        """The tensors on disk, by name; a packed tensor is replaced by its parts."""
        parts = {part.name: part for packed in self.packed.values() for part in packed.parts.values()}
        return {name: info for name, info in self.tensors.items() if name not in self.packed} | parts

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def refuse_changes(self) -> None:
        """Raise CheckpointError if a file's size or modification time has changed since it was opened: what was read
        may mix two versions. Call this before a result is published."""
        for file, stamp in zip(self.files, self.stamps, strict=False):
            if stamp_of(file) != stamp:
                raise CheckpointError(f"{file}: changed while it was read; run it again once nobody writes there")


def stamp_of(file: Path) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds; (-1, 0) if the file is missing."""
    try:
        status = file.stat()
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


@collection_paused()
def open_checkpoint(source: str | Path, *, adapters: bool = True) -> Checkpoint:
    """Index a local folder, or download a hub id (`organisation/name`, optionally `@revision`) and index that.

    A string that names an existing folder means that folder. A Path is never a hub id. An adapter's folder gives its
    base with the adapter applied; adapters: whether an adapter is accepted.

    Raises:
        CheckpointError: no such folder or model; pickled weights only; a shard that is missing, truncated or has a
            wrong header; an index that names an absent tensor or a file outside the folder; an unknown dtype.
    """
    folder = Path(source)
    if not is_folder(source):
        if folder.suffix == SUFFIX and folder.is_file():
            return _of_gguf(folder, folder)
        if folder.exists():
            raise CheckpointError(f"{folder}: is a file; give the folder that holds config.json and the weights")
        if isinstance(source, Path):
            raise CheckpointError(f"{folder}: no such folder")
        folder = fetch(source)
    refuse_special(folder)
    if is_adapter(folder):
        return _with_adapter(folder, open_checkpoint, adapters)
    if len(found := sorted(folder.glob(f"*{SUFFIX}"))) == 1 and not any(folder.glob("*.safetensors")):
        return _of_gguf(folder, found[0])
    files, weight_map = weight_files(folder)
    stamps = tuple(map(stamp_of, files))
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        shard = file.name
        for name, info in read_header(file).items():
            if weight_map.get(name, shard) != shard:
                continue  # the index assigns this name to another shard
            if name in tensors:
                raise CheckpointError(f"{name}: in {tensors[name].file.name} and in {file.name} of {folder}; keep one")
            tensors[name] = info
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"{folder}: has more than {MAX_TENSORS:,} tensors; no model that is merged here has")
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{folder / INDEX}: says that {name} is in {shard}, which does not have it; download both again"
            )
    if not tensors:
        raise CheckpointError(f"{folder}: its safetensors hold no tensor")
    config = read_config(folder)
    return _checked(Checkpoint(folder, tensors, files, config, stamps))


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with quantised tensors as whole matrices. Refuses tensors that ZeRO-3 left empty, and more layers
    than tensors: a library would build them all before it noticed that weights are missing."""
    for info in checkpoint.tensors.values():
        if info.shape == (0,) and "weight" in info.name:
            raise CheckpointError(
                f"{info.file}: {info.name} is empty, as weights saved under ZeRO-3 without gathering are; convert the "
                "training's checkpoint with DeepSpeed's zero_to_fp32.py"
            )
    at_hand = (_bytes_of,) if checkpoint.stamps else ()
    whole, packed = seen_whole(checkpoint.tensors, checkpoint.config, *at_hand)
    for key, number in _counts(checkpoint.config, _LAYERS):
        if number > len(whole):
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: {key} is {number}, but the files hold {len(whole)} tensors; "
                "download config.json again"
            )
    return replace(checkpoint, tensors=whole, packed=packed)


def _of_gguf(path: Path, file: Path) -> Checkpoint:
    stamps = (stamp_of(file),)
    tensors, packed, config = gguf_tensors(file)
    return Checkpoint(path, tensors, (file,), config, stamps, packed)


def _bytes_of(info: TensorInfo) -> bytes:
    """The bytes of a small tensor of a local file."""
    with open_regular(info.file) as file:
        file.seek(info.begin)
        return file.read(min(info.nbytes, MAX_JSON))


def _with_adapter(folder: Path, opener: Callable[..., Checkpoint], allowed: bool = True) -> Checkpoint:
    """The base that an adapter's config names, with the adapter applied."""
    if not allowed:
        raise CheckpointError(f"{folder}: is an adapter on an adapter; merge it with `{adapter.merging(folder)}`")
    config, weights = load_json(folder / adapter.CONFIG), folder / adapter.WEIGHTS
    if not weights.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise CheckpointError(pickled(folder, "adapter_model"))
        raise CheckpointError(f"{folder}: has {adapter.CONFIG} without {adapter.WEIGHTS}; download it again")
    named, revision = str(config.get("base_model_name_or_path") or ""), config.get("revision")
    if not named:
        raise CheckpointError(f"{folder / adapter.CONFIG}: names no base_model_name_or_path; add the model's folder")
    inner = folder / named
    local = named if is_folder(named) or not inner.is_dir() else str(inner)
    try:
        base = opener(local if Path(local).is_dir() or not revision else f"{local}@{revision}", adapters=False)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: is an adapter, and its base cannot be read ({error}); write the base's folder into "
            f"{adapter.CONFIG}, or merge it with `{adapter.merging(folder)}`"
        ) from None
    if base.packed:
        raise CheckpointError(f"{folder}: its base {base.path} is quantised; name a 16-bit one in {adapter.CONFIG}")
    tensors, packed = adapter.adapted(folder, config, read_header(weights), base.tensors)
    files, stamps = (*base.files, weights), (*base.stamps, stamp_of(weights))
    return Checkpoint(folder, tensors, files, base.config, stamps, packed, base.path)


def remote_headers(source: str) -> Checkpoint:
    """A checkpoint on the hub from its headers: names, dtypes and shapes are exact, the files are not on this machine.

    `files` and `TensorInfo.file` are the hub id joined with the file's name; `begin` is relative to the file's data.
    Only config.json is downloaded.

    Raises:
        CheckpointError: not on the hub, gated, offline, or without safetensors.
    """
    name, revision = split_id(source)
    with explained(source):
        from huggingface_hub import HfApi, hf_hub_download

        metadata = retried(lambda: HfApi().get_safetensors_metadata(name, revision=revision)).files_metadata
        config = load_json(Path(retried(lambda: hf_hub_download(name, "config.json", revision=revision))))
    folder = Path(source)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(metadata):
        infos = metadata[file].tensors
        for tensor in sorted(infos, key=lambda key: infos[key].data_offsets[0]):
            begin, end = infos[tensor].data_offsets
            dtype, shape = str(infos[tensor].dtype), tuple(infos[tensor].shape)
            tensors[tensor] = TensorInfo(tensor, dtype, shape, folder / file, begin, end - begin)
    return _checked(Checkpoint(folder, tensors, tuple(folder / file for file in sorted(metadata)), config))


def open_headers(source: str | Path, *, adapters: bool = True) -> Checkpoint:
    """A checkpoint for planning: a local folder as `open_checkpoint` opens it, a hub id from its headers alone, or from
    the cache if the hub cannot be reached."""
    if not (isinstance(source, str) and is_hub_id(source)):
        return open_checkpoint(source, adapters=adapters)
    try:
        headers = remote_headers(source)
        if any(".quant_state.bitsandbytes__" in name for name in headers.tensors):
            if (folder := cached_folder(source)) is None:
                raise CheckpointError(
                    f"{source}: is quantised to 4 bits by bitsandbytes, which keeps shapes in the weights, not "
                    f"in headers; download it first: `hf download {source.partition('@')[0]}`"
                )
            return open_checkpoint(folder, adapters=adapters)
        return headers
    except UnreachableError:
        folder = cached_folder(source)
        if folder is None:
            raise
        return open_checkpoint(folder, adapters=adapters)
    except NoSafetensorsError:
        if not is_adapter(fetch(source, headers_only=True)):
            raise
        return _with_adapter(fetch(source), open_headers, adapters)


def read_config(folder: Path) -> dict[str, Any]:
    """The mapping of config.json, {} without one. Model types must be printable names and layer counts within
    `MAX_LAYERS`, so that building a model from it takes bounded time and memory.

    Raises:
        CheckpointError: naming the field.
    """
    file = folder / "config.json"
    config = load_json(file) if file.exists() else {}
    for prefix, section in _sections(config, ""):
        model_type = section.get("model_type", "")
        if not isinstance(model_type, str) or len(model_type) > 100 or not model_type.isprintable():
            raise CheckpointError(
                f"{file}: {prefix}model_type is {model_type!r:.120}, which is no name; download config.json again"
            )
    for key, number in _counts(config):
        if not 0 <= number <= MAX_LAYERS:
            raise CheckpointError(
                f"{file}: {key} is {number!r:.60}, not up to {MAX_LAYERS:,}; download config.json again"
            )
    if not isinstance(config.get("text_config", {}), dict | None):
        raise CheckpointError(f"{file}: text_config is no mapping; download config.json again")
    return config


_LAYERS = re.compile(r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|depth")
_EXPERTS = re.compile(r"num_(local_|routed_)?experts|n_routed_experts")


def _sections(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A config and the configs nested in it, each with the dotted prefix of its keys."""
    yield prefix, config
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _sections(value, f"{prefix}{key}.")


def _counts(config: dict[str, Any], names: re.Pattern[str] | None = None) -> Iterator[tuple[str, int | float]]:
    """Dotted key and value of every number of layers (or, without `names`, of layers and experts) in a config."""
    for prefix, section in _sections(config, ""):
        for key, number in section.items():
            counted = names.fullmatch(key) if names else _LAYERS.fullmatch(key) or _EXPERTS.fullmatch(key)
            if counted and isinstance(number, int | float):
                yield f"{prefix}{key}", number
