"""Receipts of folders that were written whole: digests of their files, and of every tensor, read back from them.

A merge takes its digests from memory while it writes; here other libraries wrote, and the pages are still in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.digests import RECEIPT, FileReceipt, files_in, range_digest, seal, whole_file
from vlmgraft.checkpoint.header import read_header
from vlmgraft.records import write_json

SUFFIX = ".safetensors"


def write_receipt(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write receipt.json: `facts`, a row for every tensor and every file of the folder, and its own digest."""
    files, tensors = read_back(folder)
    seal_receipt(folder, {**facts, "tensors": tensors, "files": [asdict(file) for file in files]})


def seal_receipt(folder: Path, document: Mapping[str, Any]) -> None:
    """Write receipt.json with its own digest as the last key."""
    sealed = {**document, "digest": ""}
    write_json(folder / RECEIPT, {**sealed, "digest": seal(sealed)})


def read_back(folder: Path) -> tuple[list[FileReceipt], list[dict[str, Any]]]:
    """What is in a folder, all of it read. Raises CheckpointError, OSError."""
    files: list[FileReceipt] = []
    tensors: list[dict[str, Any]] = []
    for path in files_in(folder):
        if path.name == RECEIPT and path.parent == folder:
            continue
        if path.suffix != SUFFIX:
            files.append(whole_file(path, folder))
            continue
        file, rows = tensor_file(path, folder, {})
        files.append(file)
        tensors += rows
    return files, tensors


def tensor_file(path: Path, folder: Path, digests: Mapping[str, str]) -> tuple[FileReceipt, list[dict[str, Any]]]:
    """The receipt of a safetensors file. Of tensors whose digest is given, only the header's entry is read."""
    found = read_header(path)
    size = path.stat().st_size
    begin = min((info.begin for info in found.values()), default=size)
    name = path.relative_to(folder).as_posix()
    rows = []
    for info in found.values():
        digest = digests.get(info.name) or range_digest(path, info.begin, info.nbytes)
        known = {"name": info.name, "file": name, "dtype": info.dtype, "shape": list(info.shape)}
        rows.append(known | {"digest": digest})
    return FileReceipt(name, size, begin, range_digest(path, 0, begin), tuple(found)), rows
