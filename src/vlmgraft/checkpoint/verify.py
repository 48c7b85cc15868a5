"""Checks a folder against its receipt: names, dtypes, shapes, sizes, and a digest of every byte.

For folders that `merge`, `tune`, `decompose`, `gates`, `evaluate` and `export --to lora` wrote. Digests of vlmgraft's
own output were taken from memory before the bytes went to disk; those of copied files, and of files that a library
wrote, afterwards. Changes by the disk, by a copy or by a later edit are found. No link is followed, and only regular
files are opened. Needs no torch.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmgraft.checkpoint.digests import RECEIPT, range_digest, read_sources, seal
from vlmgraft.checkpoint.files import kind_of, open_regular, parse_json
from vlmgraft.checkpoint.header import TensorInfo, read_header
from vlmgraft.checkpoint.index import Checkpoint, open_checkpoint
from vlmgraft.errors import CheckpointError, printable
from vlmgraft.storage.jsonl import json_text
from vlmgraft.storage.limits import MAX_HEADER
from vlmgraft.storage.progress import LogProgress, Progress

REMEDY = "give a folder that `merge --out`, `tune`, `decompose`, `gates`, `evaluate` or `export --to lora` wrote"


@dataclass(frozen=True)
class Fault:
    """A difference from the receipt. file: relative to the folder; absolute for a source. tensor: None if the fault is
    the file as a whole, its header or its size."""

    file: str
    tensor: str | None
    what: str

    def __str__(self) -> str:
        return printable(": ".join(part for part in (self.file, self.tensor, self.what) if part))


@dataclass(frozen=True)
class Verification:
    """What was checked, and the faults found. unlisted: files, links and other entries of the folder that the receipt
    does not list; they were not opened."""

    path: str
    files: int
    tensors: int
    nbytes: int
    faults: tuple[Fault, ...]
    unlisted: tuple[str, ...]

    @property
    def unchanged(self) -> bool:
        """Whether the folder holds exactly what its receipt lists. An extra file can change what a library loads from
        it: model.safetensors is read instead of the shards, adapter_config.json adds an adapter to the model."""
        return not self.faults and not self.unlisted


def verify(
    folder: str | Path,
    *,
    sources: Mapping[str, str | Path] | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> Verification:
    """Compare every byte of a folder with its receipt, which was written by the command that made the folder.

    sources: checkpoints that it was made from, by their names in the receipt ("vlm", "donor", "donor_base", …). The
    tensors that were read from them are compared, too.

    Raises:
        CheckpointError: no such folder, no receipt, or a receipt with invalid rows: without digests, with file names
            outside the folder, with a file or tensor twice; a source that the receipt does not name, or that is not a
            checkpoint.
    """
    folder, progress = Path(folder), progress or LogProgress()
    present = _present(folder)
    receipt = _receipt(folder, present)
    if receipt is None:
        damaged = Fault(RECEIPT, None, "is not as it was written; nothing else can be checked against it")
        return Verification(str(folder), 0, 0, 0, (damaged,), ())
    files: list[dict[str, Any]] = receipt["files"]
    tensors: list[dict[str, Any]] = receipt["tensors"]
    faults: list[Fault] = []
    located: dict[tuple[str, str], TensorInfo] = {}
    for row in files:
        header: dict[str, TensorInfo] = {}
        faults += _check_file(folder, row, present.get(row["name"]), header)
        located |= {(row["name"], name): info for name, info in header.items()}
    with ThreadPoolExecutor(threads) as pool:
        keys = _keys(receipt)
        checked = pool.map(lambda key, row: _check_tensor(folder, key[0], row, located.get(key)), keys, tensors)
        for number, (row, differences) in enumerate(zip(tensors, checked, strict=True), 1):
            faults += differences
            progress(number, len(tensors), row["name"])
        for key, source in (sources or {}).items():
            read = read_sources(receipt, folder / RECEIPT).get(key)
            if read is None:
                known = ", ".join(receipt.get("sources", {})) or "none"
                raise CheckpointError(f"{folder / RECEIPT}: names no source {key!r:.60}; it has {known:.300}")
            faults += _check_source(open_checkpoint(source), read, pool)
    unlisted = sorted(present.keys() - {row["name"] for row in files} - {RECEIPT})
    nbytes = sum(row["size"] for row in files)
    return Verification(str(folder), len(files), len(tensors), nbytes, tuple(faults), tuple(unlisted))


def _present(folder: Path) -> dict[str, os.stat_result]:
    """Everything in a folder and its subfolders except folders: relative names with slashes. A link to a folder counts
    as a link."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; {REMEDY}")
    if not os.path.lexists(folder / RECEIPT):  # before the walk
        raise CheckpointError(f"{folder}: has no {RECEIPT}; {REMEDY}")
    present = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            with suppress(FileNotFoundError):  # removed meanwhile: reported as missing
                status = path.lstat()
                if not stat.S_ISDIR(status.st_mode):
                    present[path.relative_to(folder).as_posix()] = status
    return present


def _check_file(
    folder: Path, row: Mapping[str, Any], status: os.stat_result | None, header: dict[str, TensorInfo]
) -> Iterator[Fault]:
    """Check a file's kind, size and own digest, and put the tensors that it holds into `header`.

    Bytes that the file's digest does not cover must be covered by tensors, all of them listed in the receipt.
    """
    name, path = row["name"], folder / row["name"]
    if status is None:
        yield Fault(name, None, "is missing")
        return
    if not stat.S_ISREG(status.st_mode):
        yield Fault(name, None, f"is {kind_of(status.st_mode)}, not a file")
        return
    if status.st_size != row["size"]:
        yield Fault(name, None, f"has {status.st_size} bytes, not {row['size']}")
    intact = _digest(path, 0, row["digested"]) == row["digest"]
    if not intact:
        part = "its header" if row["digested"] < row["size"] else "its content"
        yield Fault(name, None, f"{part} is not what was written")
    if row["digested"] == row["size"] and not row["tensors"]:
        return
    try:
        header |= read_header(path)
    except CheckpointError as error:
        yield Fault(name, None, f"its header cannot be used ({error})")
        return
    for tensor in sorted(header.keys() - set(row["tensors"])):
        yield Fault(name, tensor, "is not in the receipt")
    if intact and row["digested"] != min((info.begin for info in header.values()), default=row["size"]):
        yield Fault(name, None, f"the receipt covers {row['digested']} bytes before the tensors, not all")


def _keys(receipt: Mapping[str, Any]) -> list[tuple[str, str]]:
    """File and name of every tensor row; a row names its file if several files hold tensors of the same name."""
    shards = {name: row["name"] for row in receipt["files"] for name in row["tensors"]}
    return [(row.get("file") or shards[row["name"]], row["name"]) for row in receipt["tensors"]]


def _check_tensor(folder: Path, file: str, row: Mapping[str, Any], info: TensorInfo | None) -> list[Fault]:
    """Check a tensor's file, dtype, shape and bytes."""
    name = row["name"]
    if info is None:
        return [Fault(file, name, "is not there")]
    if (info.dtype, list(info.shape)) != (row["dtype"], row["shape"]):
        return [Fault(file, name, f"is {info.dtype} {list(info.shape)}, not {row['dtype']} {row['shape']}")]
    if _digest(folder / file, info.begin, info.nbytes) != row["digest"]:
        return [Fault(file, name, "its bytes are not what was written")]
    return []


def _check_source(checkpoint: Checkpoint, read: Mapping[str, str], pool: ThreadPoolExecutor) -> Iterator[Fault]:
    """Compare the tensors that were read from a checkpoint with their digests."""

    def differs(name: str) -> Fault | None:
        info = checkpoint.stored.get(name)
        if info is None:
            return Fault(str(checkpoint.path.absolute()), name, "was read, and is not there")
        same = _digest(info.file, info.begin, info.nbytes) == read[name]
        return None if same else Fault(str(info.file.absolute()), name, "its bytes are not what was read")

    yield from filter(None, pool.map(differs, read))


def _digest(path: Path, begin: int, size: int) -> str:
    """The digest of a range of a file, or the error that prevents it."""
    try:
        return range_digest(path, begin, size)
    except OSError as error:
        return str(error.strerror)
    except CheckpointError as error:
        return str(error)


def _receipt(folder: Path, present: Mapping[str, os.stat_result]) -> dict[str, Any] | None:
    """The receipt with its rows checked, or None if it is not byte for byte what was written."""
    path = folder / RECEIPT
    if not stat.S_ISREG(present[RECEIPT].st_mode):
        raise CheckpointError(f"{path}: is {kind_of(present[RECEIPT].st_mode)}, not a file; {REMEDY}")
    with open_regular(path) as file:
        raw = file.read(MAX_HEADER + 1)
    if len(raw) > MAX_HEADER:
        raise CheckpointError(f"{path}: has more than {MAX_HEADER:,} bytes, which no receipt needs; {REMEDY}")
    try:
        receipt = parse_json(raw, f"{path}:", strict=False)
    except CheckpointError:
        return None
    if not {"files", "digest"} & receipt.keys():
        raise CheckpointError(f"{path}: has no digests to check against; make it again with this version")
    try:
        if receipt.get("digest") != seal(receipt) or raw != json_text(receipt).encode():
            return None
    except UnicodeEncodeError:  # half a surrogate pair, which no command writes
        return None
    _refuse_rows(path, receipt)
    return receipt


_FILE = {"name": str, "size": int, "digested": int, "digest": str, "tensors": list}
_TENSOR = {"name": str, "dtype": str, "shape": list, "digest": str}


def _refuse_rows(path: Path, receipt: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the rows are well-formed: typed, each file and tensor once, every file in the
    folder, every tensor in a file that lists it."""
    files, tensors = receipt.get("files"), receipt.get("tensors")
    for rows, types in ((files, _FILE), (tensors, _TENSOR)):
        if not isinstance(rows, list):
            raise CheckpointError(f"{path}: its rows are not those of a receipt; make it again")
        for row in rows:
            if not isinstance(row, dict) or any(type(row.get(key)) is not kind for key, kind in types.items()):
                raise CheckpointError(f"{path}: {row!r:.200} is no row of a receipt; make it again")
    assert files is not None and tensors is not None
    for row in files:
        if not is_relative(row["name"]):
            raise CheckpointError(f"{path}: names {row['name']!r:.200}; only files of its own folder are read")
        if row["name"] == RECEIPT or not 0 <= row["digested"] <= row["size"]:
            raise CheckpointError(f"{path}: {row!r:.200} is no row of a receipt; make it again")
        if not all(isinstance(name, str) for name in row["tensors"]):
            raise CheckpointError(f"{path}: {row['name']!r:.200} has tensors that are no names; make it again")
    listed = [(row["name"], name) for row in files for name in row["tensors"]]
    try:
        keys = _keys(receipt)
        consistent = sorted(listed) == sorted(keys)
    except (KeyError, TypeError):
        consistent = False
    names = [row["name"] for row in files]
    if not consistent or len(set(listed)) < len(listed) or len(set(names)) < len(names):
        raise CheckpointError(f"{path}: names a file or tensor twice, or a tensor in no file; make it again")


def is_relative(name: str) -> bool:
    """Whether a relative name stays in its folder."""
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))
