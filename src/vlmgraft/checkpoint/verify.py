"""Checks a folder against its receipt: names, dtypes, shapes, sizes, and a digest of every byte.

For folders of `merge`, `tune`, `decompose`, `gates`, `evaluate` and `export --to lora`. Digests of what we write were
taken from memory, before the bytes went to the disk; those of what a library wrote, and of copied files, afterwards.
What the disk, a copy or a later edit changed is found. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.digests import RECEIPT, files_in, range_digest, seal
from vlmgraft.checkpoint.header import TensorInfo, read_header
from vlmgraft.errors import CheckpointError
from vlmgraft.records import json_text

Progress = Callable[[int, int, str], None]
REMEDY = "give a folder that `merge --out`, `tune`, `decompose`, `gates`, `evaluate` or `export --to lora` wrote"


@dataclass(frozen=True)
class Fault:
    """What is not as the receipt says. tensor: None where it is the file as a whole, its header or its size."""

    file: str
    tensor: str | None
    what: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.tensor, self.what) if part)


@dataclass(frozen=True)
class Verification:
    """What was checked, and the faults found. unlisted: files that the receipt does not know; they were not checked."""

    path: str
    files: int
    tensors: int
    nbytes: int
    faults: tuple[Fault, ...]
    unlisted: tuple[str, ...]


def verify(folder: str | Path, *, threads: int = 2, progress: Progress | None = None) -> Verification:
    """Compare every byte of a folder with the receipt that the command which made it wrote into it.

    Raises:
        CheckpointError: no such folder, no receipt, or a receipt without digests or with file names outside the folder.
    """
    folder = Path(folder)
    receipt = _receipt(folder)
    if receipt is None:
        damaged = Fault(RECEIPT, None, "is not as it was written; nothing else can be checked against it")
        return Verification(str(folder), 0, 0, 0, (damaged,), ())
    files: list[dict[str, Any]] = receipt["files"]
    tensors: list[dict[str, Any]] = receipt["tensors"]
    faults: list[Fault] = []
    located: dict[tuple[str, str], TensorInfo] = {}
    for row in files:
        faults += _check_file(folder, row)
        if row["tensors"] and (folder / row["name"]).is_file():
            try:
                header = read_header(folder / row["name"])
                located.update({(row["name"], name): info for name, info in header.items()})
            except CheckpointError as error:
                faults.append(Fault(row["name"], None, f"its header cannot be used ({error})"))
    with ThreadPoolExecutor(threads) as pool:
        places = _places(receipt)
        checked = pool.map(lambda place, row: _check_tensor(folder, place[0], row, located.get(place)), places, tensors)
        for number, (row, found) in enumerate(zip(tensors, checked, strict=True), 1):
            faults += found
            if progress is not None:
                progress(number, len(tensors), row["name"])
    listed = {row["name"] for row in files} | {RECEIPT}
    unlisted = sorted({path.relative_to(folder).as_posix() for path in files_in(folder)} - listed)
    nbytes = sum(row["size"] for row in files)
    return Verification(str(folder), len(files), len(tensors), nbytes, tuple(faults), tuple(unlisted))


def _check_file(folder: Path, row: Mapping[str, Any]) -> Iterator[Fault]:
    """A file's size and the bytes that its own digest covers."""
    path = folder / row["name"]
    if not path.is_file():
        yield Fault(row["name"], None, "is missing")
        return
    size = path.stat().st_size
    if size != row["size"]:
        yield Fault(row["name"], None, f"has {size} bytes, not {row['size']}")
    if _digest(path, 0, row["digested"]) != row["digest"]:
        part = "its header" if row["digested"] < row["size"] else "its content"
        yield Fault(row["name"], None, f"{part} is not what was written")


def _places(receipt: Mapping[str, Any]) -> list[tuple[str, str]]:
    """File and name of every tensor row; a row names its file where several files hold tensors of one name."""
    shards = {name: row["name"] for row in receipt["files"] for name in row["tensors"]}
    return [(row.get("file") or shards[row["name"]], row["name"]) for row in receipt["tensors"]]


def _check_tensor(folder: Path, file: str, row: Mapping[str, Any], found: TensorInfo | None) -> list[Fault]:
    """A tensor's place, dtype, shape and bytes."""
    name = row["name"]
    if found is None:
        return [Fault(file, name, "is not there")]
    if (found.dtype, list(found.shape)) != (row["dtype"], row["shape"]):
        return [Fault(file, name, f"is {found.dtype} {list(found.shape)}, not {row['dtype']} {row['shape']}")]
    if _digest(folder / file, found.begin, found.nbytes) != row["digest"]:
        return [Fault(file, name, "its bytes are not what was written")]
    return []


def inside(name: str) -> bool:
    """Whether a relative name stays in its folder."""
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def _digest(path: Path, begin: int, size: int) -> str:
    try:
        return range_digest(path, begin, size)
    except OSError as error:
        return str(error.strerror)


def _receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt with its rows checked, or None if it is not byte for byte what was written."""
    path = folder / RECEIPT
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; {REMEDY}")
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {RECEIPT}; {REMEDY}")
    raw = path.read_bytes()
    try:
        receipt = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(receipt, dict) or not {"files", "digest"} & receipt.keys():
        raise CheckpointError(f"{path}: has no digests to check against; make it again with this version")
    if receipt.get("digest") != seal(receipt) or raw != json_text(receipt).encode():
        return None
    try:
        names = [str(row["name"]) for row in receipt["files"]]
        known = all({"size", "digested", "digest"} <= row.keys() for row in receipt["files"])
        held = [(row["name"], name) for row in receipt["files"] for name in row["tensors"]]
        known &= sorted(held) == sorted(_places(receipt))
        known &= all({"name", "dtype", "shape", "digest"} <= row.keys() for row in receipt["tensors"])
    except (AttributeError, KeyError, TypeError):
        known, names = False, []
    for name in names:
        if not inside(name):
            raise CheckpointError(f"{path}: names {name!r}; only files of its own folder are read")
    if not known:
        raise CheckpointError(f"{path}: its rows are not those of a receipt; make it again")
    return receipt
