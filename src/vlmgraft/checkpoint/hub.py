"""Checkpoints on the Hugging Face hub: `organisation/name` or `organisation/name@revision`.

`fetch` downloads what a merge needs (weights in safetensors, configs, tokenizer, processor, remote code) into
huggingface_hub's cache. `remote_headers` reads the headers alone, by range requests of some kilobytes a shard: enough
to align and to plan. huggingface_hub is imported when a hub id is met, not before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.files import load_json
from vlmgraft.checkpoint.header import TensorInfo
from vlmgraft.checkpoint.index import Checkpoint, open_checkpoint
from vlmgraft.errors import CheckpointError

WEIGHTS = ("*.safetensors",)
SMALL = ("*.json", "*.txt", "*.jinja", "*.model", "*.py", "*.tiktoken")
SKIPPED = ("*/*", "consolidated*", "optimizer*", "training_args*")
"""Subfolders (other formats of the same weights), duplicate weights and training state are not downloaded."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


def split_id(source: str) -> tuple[str, str | None]:
    """("organisation/name", revision or None) of a hub id.

    Raises:
        CheckpointError: neither a folder that exists nor the form of a hub id.
    """
    name, _, revision = source.partition("@")
    if not _HUB_ID.fullmatch(name) or len(name) > 200:
        raise CheckpointError(
            f"{source}: no such folder, and not a hub id (organisation/name or organisation/name@revision)"
        )
    return name, revision or None


def fetch(source: str, *, headers_only: bool = False) -> Path:
    """Download a model from the hub and give its local folder; files in the cache are not downloaded again.

    Args:
        headers_only: leave the weights out (configs, index and tokenizer only); `remote_headers` reads their headers.
    Raises:
        CheckpointError: not on the hub, gated, offline, or without safetensors.
    """
    name, revision = split_id(source)
    with _explained(source):
        from huggingface_hub import snapshot_download

        patterns = [*SMALL, *(() if headers_only else WEIGHTS)]
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=list(SKIPPED))
    path = Path(str(folder))
    if not headers_only and not any(path.glob("*.safetensors")):
        raise CheckpointError(_no_safetensors(source))
    return path


def remote_headers(source: str) -> Checkpoint:
    """A checkpoint on the hub by its headers: names, dtypes and shapes are true, the files are not on this machine.

    `files` and `TensorInfo.file` are the hub id joined with the file's name; `begin` is relative to the file's data.
    Only config.json is downloaded.

    Raises:
        CheckpointError: not on the hub, gated, offline, or without safetensors.
    """
    name, revision = split_id(source)
    with _explained(source):
        from huggingface_hub import HfApi, hf_hub_download

        found = HfApi().get_safetensors_metadata(name, revision=revision)
        config = load_json(Path(hf_hub_download(name, "config.json", revision=revision)))
    folder = Path(source)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(found.files_metadata):
        infos = found.files_metadata[file].tensors
        for tensor in sorted(infos, key=lambda key: infos[key].data_offsets[0]):
            begin, end = infos[tensor].data_offsets
            dtype, shape = str(infos[tensor].dtype), tuple(infos[tensor].shape)
            tensors[tensor] = TensorInfo(tensor, dtype, shape, folder / file, begin, end - begin)
    return Checkpoint(folder, tensors, tuple(folder / file for file in sorted(found.files_metadata)), config)


def open_headers(source: str | Path) -> Checkpoint:
    """A checkpoint for planning: a local folder as `open_checkpoint` gives it, a hub id by its headers alone."""
    return remote_headers(str(source)) if isinstance(source, str) and is_hub_id(source) else open_checkpoint(source)


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn huggingface_hub's errors into `CheckpointError` with the remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(f"{source}: gated; accept its terms on the hub and log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{source}: the model exists, this revision does not") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{source}: no such folder, and no such model on the hub (or it is private: log in)"
        ) from None
    except errors.NotASafetensorsRepoError:
        raise CheckpointError(_no_safetensors(source)) from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{source}: no such folder, and not a hub id ({error})") from None
    except (OSError, *errors.HfHubHTTPError.__bases__) as error:  # the HTTP client's own base, whichever it is
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{source}: no such folder, and it cannot be downloaded ({first}); give a folder that exists"
        ) from None


def _no_safetensors(source: str) -> str:
    return (
        f"{source}: has no safetensors; pickled .bin weights are not read. Convert them once with "
        '`python -c "from transformers import AutoModel; '
        f"AutoModel.from_pretrained('{source}').save_pretrained('OUT')\"`"
    )


def is_hub_id(source: Any) -> bool:
    """Whether a source that is not a local folder has the form of a hub id."""
    return not Path(str(source)).exists() and _HUB_ID.fullmatch(str(source).partition("@")[0]) is not None
