"""Writes a checkpoint as streamed, preallocated safetensors shards in a hidden folder, published by one rename.

Names, dtypes and shapes are known before the first byte, so headers are written first, tensors in any order and from
any thread, the index last. No folder of the final name exists before the rename.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from vlmgraft.checkpoint.digests import BLOCK, RECEIPT, FileReceipt, block_digests, files_in, joined, whole_file
from vlmgraft.checkpoint.files import INDEX
from vlmgraft.checkpoint.handles import CODES, TORCH_DTYPES, Handles, as_bytes
from vlmgraft.checkpoint.header import Shard, TensorSpec, header_of, plan_shards
from vlmgraft.errors import DamagedError, OutputError
from vlmgraft.storage.files import new_file
from vlmgraft.storage.jsonl import append_row, read_rows, write_json, write_rows
from vlmgraft.storage.outputs import refuse_output
from vlmgraft.storage.publish import Publication
from vlmgraft.storage.resources import cannot_write

JOURNAL = ".journal.jsonl"
FLUSH = 1 << 28
"""Bytes of finished tensors after which they are flushed to disk in the background."""


class Writer:
    """Context manager that writes the checkpoint `out`: complete under its name after a clean exit, absent otherwise.

    Args:
        tensors: in the order of the files.
        shard_size: largest number of data bytes per file.
        resume: a key that identifies the content. An interrupted folder with the same key is kept and resumed: `done`
            holds what `finish` recorded. Without a key an interrupted folder is removed.
        anew: with a key, start from nothing; what is written is kept only if the user interrupts the run.
    Raises:
        OutputError: `out` exists, cannot be written, the disk is too small, or another process is writing it.
    """

    def __init__(
        self,
        out: str | Path,
        tensors: Sequence[TensorSpec],
        shard_size: int,
        resume: str | None = None,
        anew: bool = False,
    ) -> None:
        self.out = Path(out)
        refuse_output(self.out)
        self.shards = plan_shards(tensors, shard_size)
        self._publication = Publication(self.out, resume, anew=anew)
        self.folder = self._publication.folder
        self.done: dict[str, dict[str, Any]] = {}
        self._digests: dict[str, dict[int, bytes]] = {}
        self._resume = resume
        self._handles = Handles(os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._flusher = ThreadPoolExecutor(1)
        self._flushes: list[Future[None]] = []
        self._dirty: dict[str, int] = {}
        self._layout: dict[str, tuple[str, int, TensorSpec]] = {}
        for shard in self.shards:
            begin = len(shard.header)
            for tensor in shard.tensors:
                self._layout[tensor.name] = (shard.name, begin, tensor)
                begin += tensor.nbytes
        if len(self._layout) != len(tensors):
            raise ValueError("two tensors of one name")

    def __enter__(self) -> Writer:
        with ExitStack() as stack:
            stack.enter_context(self._publication)
            stack.callback(self._handles.close)
            stack.callback(self._flusher.shutdown, cancel_futures=True)
            self._load_journal()
            for shard in self.shards:
                self._allocate(shard)
            stack.push(self._complete)
            self._stack = stack.pop_all()
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor, which must have the planned dtype and shape."""
        spec = self._layout[name][2]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name}: {tuple(tensor.shape)} written, {spec.shape} planned")
        self.write_at(name, 0, tensor.reshape(-1))

    def write_at(self, name: str, start: int, tensor: Tensor) -> None:
        """Write elements from index `start` on; thread-safe for pieces that do not overlap."""
        spec = self._layout[name][2]
        if tensor.dtype != TORCH_DTYPES[spec.dtype]:
            raise ValueError(f"{name}: {tensor.dtype} written, {spec.dtype} planned")
        if tensor.numel():
            self.write_bytes(name, start * tensor.element_size(), as_bytes(tensor.contiguous()))

    def write_bytes(self, name: str, offset: int, data: memoryview) -> None:
        """Write raw bytes of a tensor from byte `offset` on."""
        shard, begin, spec = self._layout[name]
        if offset < 0 or offset + len(data) > spec.nbytes:
            raise ValueError(f"{name}: bytes {offset} to {offset + len(data)} of {spec.nbytes}")
        if offset % BLOCK == 0:
            self._digests.setdefault(name, {}).update(enumerate(block_digests(data), offset // BLOCK))
        done, path = 0, self.folder / shard
        try:
            with self._handles.of(path) as handle:
                while done < len(data):
                    done += os.pwrite(handle, data[done:], begin + offset + done)
        except OSError as error:
            raise cannot_write(path, error) from None

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor in the output."""
        return self._layout[name][2]

    def digest(self, name: str) -> str:
        """The digest of a tensor that this process wrote, in pieces that begin and end at block boundaries."""
        blocks = self._digests.pop(name, {})
        if sorted(blocks) != list(range(-(-self._layout[name][2].nbytes // BLOCK))):
            raise ValueError(f"{name}: not written in whole blocks of {BLOCK} bytes")
        return joined(blocks[number] for number in sorted(blocks))

    def files(self) -> tuple[FileReceipt, ...]:
        """Write the index and give the receipts of all files in the folder; a shard's digest covers only its header."""
        self._write_index()
        shards = [
            FileReceipt(
                s.name, s.size, len(s.header), joined(block_digests(s.header)), tuple(t.name for t in s.tensors)
            )
            for s in self.shards
        ]
        known = {self.folder / name for name in (*(shard.name for shard in self.shards), JOURNAL, RECEIPT)}
        others = [path for path in files_in(self.folder) if path not in known]
        return (*shards, *(whole_file(path, self.folder) for path in others))

    def finish(self, name: str, facts: Mapping[str, Any]) -> None:
        """Record that a tensor is complete, with JSON facts about it; the record survives an interruption."""
        self.done[name] = dict(facts)
        if self._resume is not None:
            append_row(self.folder / JOURNAL, {"name": name, **facts})
        shard, _, spec = self._layout[name]
        self._dirty[shard] = self._dirty.get(shard, 0) + spec.nbytes
        if sum(self._dirty.values()) >= FLUSH:
            self._flushes += [self._flusher.submit(self._flush, shard) for shard in self._dirty]
            self._dirty = {}
        for flush in self._flushes:
            if flush.done():
                flush.result()

    def _flush(self, shard: str) -> None:
        """Flush a shard to disk; raises OutputError."""
        try:
            with self._handles.of(self.folder / shard) as handle:
                os.fsync(handle)
        except OSError as error:
            raise cannot_write(self.folder / shard, error) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _complete(self, kind: type[BaseException] | None, *_: object) -> None:
        """On a clean exit write the index, flush the tensors, then remove the journal. After a failed flush remove it
        too: the system reports such an error once, and the folder must not be resumed."""
        journal = self.folder / JOURNAL
        if kind is not None:
            if any(flush.done() and flush.exception() for flush in self._flushes):
                journal.unlink(missing_ok=True)
            return
        self._write_index()
        try:
            for flush in self._flushes:
                flush.result()
            for shard in self.shards:
                self._flush(shard.name)
        except OutputError:
            journal.unlink(missing_ok=True)
            raise
        journal.unlink(missing_ok=True)

    def _write_index(self) -> None:
        if len(self.shards) > 1:
            weight_map = {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}
            total = sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)
            write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _load_journal(self) -> None:
        """Take over the tensors that an interrupted run finished, unless the machine was restarted since."""
        if self._resume is None:
            return
        journal, names = self.folder / JOURNAL, {shard.name for shard in self.shards}
        head = {"boot": _boot_id(), "block": BLOCK, "shards": [[shard.name, shard.size] for shard in self.shards]}
        for path in self.folder.iterdir():
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):  # side files are written again
                shutil.rmtree(path)
            elif not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # a link would be written through
                raise OutputError(f"{path}: is a link or no file; remove {self.folder}, and begin anew")
        present = {path.name for path in self.folder.iterdir()}
        rows: list[dict[str, Any]] = []
        with suppress(DamagedError):
            rows = list(read_rows(journal)) if JOURNAL in present else []
        if rows and rows[0] == head and names <= present:
            self.done = {row.pop("name"): row for row in rows[1:] if "name" in row}
        for stray in present - names - {JOURNAL}:  # side and temporary files are written again
            (self.folder / stray).unlink()
        write_rows(journal, (head, *({"name": name, **facts} for name, facts in self.done.items())))

    def _allocate(self, shard: Shard) -> None:
        """Create or take over a shard file, with its final size and its header."""
        path = self.folder / shard.name
        try:
            path.touch(0o644)
            with self._handles.of(path) as handle:
                os.posix_fallocate(handle, 0, shard.size)
                os.ftruncate(handle, shard.size)
                os.pwrite(handle, shard.header, 0)
        except OSError as error:
            error.strerror = f"{error.strerror}; it takes {shard.size / 1e9:.1f} GB"
            raise cannot_write(path, error) from None


def _boot_id() -> str:
    """An id that changes when the machine restarts; a restart loses page cache that was not flushed."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else "unknown"


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a small set of tensors as one safetensors file, atomically.

    safetensors' own `save_file` writes beside its target under a random name and does not flush. Here equal tensors
    give equal bytes: the header's keys are sorted.

    Args:
        tensors: contiguous, on the CPU. metadata: strings for the header.
    Raises:
        OSError.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # every tensor aligned
    specs = [TensorSpec(name, CODES[tensors[name].dtype], tuple(tensors[name].shape)) for name in order]
    with new_file(path) as file:
        file.write(header_of(specs, dict(sorted((metadata or {}).items()))))
        for name in order:
            if tensors[name].numel():
                file.write(as_bytes(tensors[name]))
