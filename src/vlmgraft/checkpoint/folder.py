"""Which files of a folder hold its weights, or why none can be read."""

from __future__ import annotations

import shlex
from pathlib import Path

from vlmgraft.checkpoint import adapter
from vlmgraft.checkpoint.files import INDEX, SINGLE, load_json
from vlmgraft.errors import CheckpointError
from vlmgraft.storage.limits import MAX_FILE_NAME, MAX_HEADER, MAX_TENSORS


def is_folder(source: str | Path) -> bool:
    """Whether a model is given as an existing folder; raises CheckpointError if no file can have that name."""
    if not str(source).strip():
        raise CheckpointError("the name of a model is empty, which would mean this folder; give a folder or hub id")
    try:
        return Path(source).is_dir()
    except OSError as error:
        raise CheckpointError(
            f"{source!s:.120}: cannot be a folder ({error.strerror}); give a folder or hub id"
        ) from None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model; raises CheckpointError if it holds both."""
    if not (folder / adapter.CONFIG).exists():
        return False
    own = [path for pattern in ("model*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)]
    weights = [path for path in folder.glob("adapter_model.*") if path.is_file()]
    if own and weights:
        raise CheckpointError(
            f"{folder}: holds a model ({own[0].name}) and an adapter ({weights[0].name}) that libraries would put on "
            f"it; remove {adapter.CONFIG} and {weights[0].name}, or move them to a folder of their own"
        )
    return not own


def weight_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The files that hold the weights, and the index's map from tensor to file name (empty without an index)."""
    if (folder / SINGLE).exists():
        if (folder / INDEX).exists() and SINGLE not in _weight_map(folder / INDEX).values():
            raise CheckpointError(
                f"{folder}: has {SINGLE} and an {INDEX} that names other files; one of the two is left over from "
                "another save: remove it"
            )
        return (folder / SINGLE,), {}
    if (folder / INDEX).exists():
        weight_map = _weight_map(folder / INDEX)
        for file in sorted(folder.glob("model-*-of-*.safetensors")):
            if file.name not in weight_map.values():
                raise CheckpointError(f"{file}: a shard that {INDEX} does not name; remove it, or download the index")
        files = tuple(folder / shard for shard in sorted(set(weight_map.values())))
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file}: missing, but {INDEX} names it; download the checkpoint again")
        return files, weight_map
    single = sorted(folder.glob("*.safetensors"))
    if len(single) == 1 and ("-of-" not in single[0].name or single[0].name.endswith("-00001-of-00001.safetensors")):
        return (single[0],), {}
    if single:
        raise CheckpointError(f"{folder}: {len(single)} safetensors files without {INDEX}; download the index too")
    if several := sorted(folder.glob("*.gguf")):
        raise CheckpointError(f"{folder}: holds {len(several)} GGUF files; give one of them, such as {several[0]}")
    if any(folder.glob("*.bin")):
        raise CheckpointError(pickled(folder, "pytorch_model"))
    if any(folder.glob("*.pt*")):
        raise CheckpointError(f"{folder}: has pickled weights only, of no known layout; take a release in safetensors")
    raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}; give the folder of a checkpoint")


def pickled(folder: Path, stem: str) -> str:
    """The message about pickled weights, with a command that converts them and keeps names, dtypes and other files."""
    out = SINGLE if stem == "pytorch_model" else f"{stem}.safetensors"
    code = (
        "import pathlib, sys, torch; from safetensors.torch import save_file; p = pathlib.Path(sys.argv[1]); w = {}; "
        f"[w.update(torch.load(f, 'cpu', weights_only=True)) for f in sorted(p.glob('{stem}*.bin'))]; "
        f"save_file({{k: t.clone().contiguous() for k, t in w.items()}}, p / '{out}', {{'format': 'pt'}})"
    )
    return (
        f"{folder}: has pickled weights only, which can run code and are not read. Convert them once with `python -c "
        f'"{code}" {shlex.quote(str(folder))}`: it puts {out} beside the other files and runs no code of theirs'
    )


def _weight_map(index: Path) -> dict[str, str]:
    """The index's map from tensor to file; every file must be a plain name beside the index."""
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
        plain = plain and shard.isprintable() and shard.endswith(".safetensors")
        if not plain or len(shard.encode()) > MAX_FILE_NAME:
            raise CheckpointError(
                f"{index}: weight_map says that {name!r:.120} is in {shard!r:.120}; only plain file names, of "
                f".safetensors beside the index, are followed; {again}"
            )
    return weight_map
