"""Uploads a finished folder to the hub, and lists beforehand what would be published."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from vlmgraft._version import __version__
from vlmgraft.errors import InputError, OutputError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class PublishedFile:
    """One file of an upload: its name relative to the folder, and its size in bytes."""

    name: str
    nbytes: int


def published(folder: Path) -> list[PublishedFile]:
    """The files that `push_to_hub` would upload, sorted by name; hidden files are not uploaded.

    Raises:
        OutputError: the folder is not a finished checkpoint.
    """
    _refuse_unfinished(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder) for path in files]
    return [
        PublishedFile(name.as_posix(), path.stat().st_size)
        for name, path in zip(names, files, strict=True)
        if not any(part.startswith(".") for part in name.parts)
    ]


def push_to_hub(
    folder: Path, name: str, *, private: bool = True, token: str | None = None, revision: str | None = None
) -> str:
    """Upload a finished folder to the hub as `organisation/name` and return the address of the commit.

    Raises:
        InputError: the name is not a hub id, the folder is not a finished checkpoint, or the hub refuses.
    """
    if not HUB_ID.fullmatch(name):
        raise InputError(f"{name!r}: a hub id is organisation/name")
    files = [file.name for file in published(folder)]
    from huggingface_hub import HfApi, errors

    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        message = f"Upload with vlmgraft {__version__}"
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=files, commit_message=message, revision=revision
        )
        return str(commit.commit_url)
    except (OSError, *errors.HfHubHTTPError.__bases__) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name}: the hub refused or cannot be reached ({reason}); log in with `hf auth login`"
        ) from None


def _refuse_unfinished(folder: Path) -> None:
    """Refuse a folder without config or card, or without a shard that its index names."""
    for name in ("config.json", "README.md"):
        if not (folder / name).is_file():
            raise OutputError(f"{folder}: no {name}; push the folder that `vlmgraft merge --out` wrote")
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise OutputError(f"{folder}: {missing[0]} is missing; the checkpoint is not finished")
