"""Writes a checkpoint as streamed, preallocated safetensors shards in a hidden folder, published by one rename.

Names, dtypes and shapes are known before the first byte, so headers are written first, tensors in any order and from
any thread, the index last. Until the rename nobody sees a folder of the final name.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from vlmgraft.checkpoint.digests import BLOCK, RECEIPT, FileReceipt, block_digests, joined, whole_file
from vlmgraft.checkpoint.index import INDEX
from vlmgraft.checkpoint.reader import TORCH_DTYPES, as_bytes
from vlmgraft.checkpoint.shards import Shard, TensorSpec, plan_shards
from vlmgraft.errors import OutputError, VlmgraftError
from vlmgraft.records import append_row, read_rows, write_json

JOURNAL = ".journal.jsonl"


def refuse_output(out: Path, inputs: Sequence[Path] = (), *, overwrite: bool = False) -> None:
    """Raise OutputError when `out` is one of `inputs`, lies inside one, or exists (a folder may, with overwrite)."""
    real = out.resolve()
    for path in inputs:
        if real == path.resolve() or path.resolve() in real.parents:
            raise OutputError(f"{out}: is the input {path} or lies inside it; choose another output folder")
    if out.is_symlink() or (out.exists() and (not overwrite or not out.is_dir())):
        raise OutputError(f"{out}: exists; choose another output folder or remove it")
    if not real.parent.is_dir() and real.parent.exists():
        raise OutputError(f"{out}: {real.parent} is not a folder")


class Writer:
    """Context manager that writes the checkpoint `out`: complete under its name after a clean exit, absent otherwise.

    Args:
        tensors: in the order of the files.
        shard_size: bytes of data per file, at most.
        overwrite: replace a folder that exists, at the end.
        resume: a key of what is being written. An interrupted folder of the same key is then kept and continued: what
            `finish` recorded is in `done`. Without a key an interrupted folder is removed, and so is one whose inputs
            were refused: the next run would meet the same refusal.
    Raises:
        OutputError: `out` exists, cannot be written, the disk is too small, or another process is writing it.
    """

    def __init__(
        self,
        out: str | Path,
        tensors: Sequence[TensorSpec],
        shard_size: int,
        overwrite: bool = False,
        resume: str | None = None,
    ) -> None:
        self.out = Path(out)
        refuse_output(self.out, overwrite=overwrite)
        self.shards = plan_shards(tensors, shard_size)
        self.folder = self.out.with_name(f".{self.out.name}.partial-{resume or os.getpid()}")
        self.done: dict[str, dict[str, Any]] = {}
        self._digests: dict[str, dict[int, bytes]] = {}
        self._overwrite, self._resume = overwrite, resume
        self._handles: dict[str, int] = {}
        self._lock = -1
        self._places: dict[str, tuple[str, int, TensorSpec]] = {}
        for shard in self.shards:
            begin = len(shard.header)
            for tensor in shard.tensors:
                self._places[tensor.name] = (shard.name, begin, tensor)
                begin += tensor.nbytes
        if len(self._places) != len(tensors):
            raise ValueError("two tensors of one name")

    def __enter__(self) -> Writer:
        try:
            self.folder.mkdir(parents=True, exist_ok=self._resume is not None)
            self._lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise OutputError(f"{self.folder}: another process is writing it") from None
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be written ({error.strerror})") from None
        try:
            self._load_journal()
            for shard in self.shards:
                self._handles[shard.name] = self._allocate(shard)
        except BaseException:
            self._close(keep=self._resume is not None)
            raise
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor, which must have the planned dtype and shape."""
        spec = self._places[name][2]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name}: {tuple(tensor.shape)} written, {spec.shape} planned")
        self.write_at(name, 0, tensor.reshape(-1))

    def write_at(self, name: str, start: int, tensor: Tensor) -> None:
        """Write elements from number `start` on; thread-safe for pieces that do not overlap."""
        spec = self._places[name][2]
        if tensor.dtype != TORCH_DTYPES[spec.dtype]:
            raise ValueError(f"{name}: {tensor.dtype} written, {spec.dtype} planned")
        if tensor.numel():
            self.write_bytes(name, start * tensor.element_size(), as_bytes(tensor.contiguous()))

    def write_bytes(self, name: str, offset: int, data: memoryview) -> None:
        """Write raw bytes of a tensor from byte `offset` on."""
        shard, begin, spec = self._places[name]
        if offset < 0 or offset + len(data) > spec.nbytes:
            raise ValueError(f"{name}: bytes {offset} to {offset + len(data)} of {spec.nbytes}")
        if offset % BLOCK == 0:
            found = self._digests.setdefault(name, {})
            for number, digest in enumerate(block_digests(data), offset // BLOCK):
                found[number] = digest
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._handles[shard], data[done:], begin + offset + done)
            except OSError as error:
                raise OutputError(f"{self.folder / shard}: cannot be written ({error.strerror})") from None

    def digest(self, name: str) -> str:
        """The digest of a tensor that this process wrote, in pieces that begin and end with blocks."""
        found = self._digests.pop(name, {})
        if sorted(found) != list(range(-(-self._places[name][2].nbytes // BLOCK))):
            raise ValueError(f"{name}: not written in whole blocks of {BLOCK} bytes")
        return joined(found[number] for number in sorted(found))

    def files(self) -> tuple[FileReceipt, ...]:
        """The index and the other files of the folder with their digests; of a shard, that of its header."""
        self._write_index()
        shards = [
            FileReceipt(
                s.name, s.size, len(s.header), joined(block_digests(s.header)), tuple(t.name for t in s.tensors)
            )
            for s in self.shards
        ]
        others = {path.name for path in self.folder.iterdir()} - {s.name for s in self.shards} - {JOURNAL, RECEIPT}
        return (*shards, *(whole_file(self.folder / name) for name in sorted(others)))

    def finish(self, name: str, facts: Mapping[str, Any]) -> None:
        """Record that a tensor is complete, with JSON values about it; survives an interruption of this process."""
        self.done[name] = dict(facts)
        if self._resume is not None:
            append_row(self.folder / JOURNAL, {"name": name, **facts})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            hopeless = issubclass(kind, VlmgraftError) and not issubclass(kind, OutputError)
            self._close(keep=self._resume is not None and not hopeless)
            return
        try:
            self._publish()
        finally:
            self._close(keep=False)

    def _publish(self) -> None:
        """Flush everything to disk, write the index, and give the folder its name."""
        for handle in self._handles.values():
            os.fsync(handle)
        self._write_index()
        (self.folder / JOURNAL).unlink(missing_ok=True)
        os.fsync(self._lock)
        try:
            if self._overwrite and self.out.is_dir():
                shutil.rmtree(self.out)
            elif self.out.exists():  # a rename would replace an empty folder in silence
                raise OutputError(f"{self.out}: appeared while it was being written; nothing was replaced")
            self.folder.rename(self.out)
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be published ({error.strerror})") from None

    def _write_index(self) -> None:
        if len(self.shards) > 1:
            weight_map = {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}
            total = sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)
            write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _close(self, *, keep: bool) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()
        if not keep and self.folder.exists():
            shutil.rmtree(self.folder)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _load_journal(self) -> None:
        """Take over what an interrupted run finished; after a restart of the machine nothing of it is trusted."""
        if self._resume is None:
            return
        journal = self.folder / JOURNAL
        head = {"boot": _boot_id(), "block": BLOCK, "shards": [[shard.name, shard.size] for shard in self.shards]}
        rows = list(read_rows(journal)) if journal.exists() else []
        if rows and rows[0] == head and all((self.folder / s.name).is_file() for s in self.shards):
            self.done = {row.pop("name"): row for row in rows[1:]}
        journal.unlink(missing_ok=True)
        for row in (head, *({"name": name, **facts} for name, facts in self.done.items())):
            append_row(journal, row)

    def _allocate(self, shard: Shard) -> int:
        """Create (or reopen) a file of its final size with its header in place."""
        path = self.folder / shard.name
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._handles[shard.name] = handle
            os.posix_fallocate(handle, 0, shard.size)
            os.ftruncate(handle, shard.size)
            os.pwrite(handle, shard.header, 0)
        except OSError as error:
            raise OutputError(f"{path}: cannot reserve {shard.size / 1e9:.1f} GB ({error.strerror})") from None
        return handle


def _boot_id() -> str:
    """Changes when the machine restarts: page cache that was not flushed is gone then."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else "unknown"
