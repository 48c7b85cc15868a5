"""Reads tensors, whole or in pieces, from safetensors shards by `pread`: thread-safe, without memory mapping.

Blocks are digested as they are read, so that a receipt can record its sources without a second pass.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmgraft.checkpoint.dequantise import dequantise
from vlmgraft.checkpoint.digests import BLOCK, block_digests, joined
from vlmgraft.checkpoint.handles import TORCH_DTYPES, Handles, as_bytes
from vlmgraft.checkpoint.header import TensorInfo
from vlmgraft.errors import CheckpointError

if TYPE_CHECKING:
    from vlmgraft.checkpoint.index import Checkpoint

DEQUANTISED = 2
"""Dequantised matrices cached per checkpoint: threads work on one tensor, or on two consecutive ones."""
DIGEST = 16
"""Bytes of a block's digest."""


class Reader:
    """Context manager over the open files of a checkpoint; a clean exit raises CheckpointError if they changed.

    Quantised tensors are read dequantised; the last few such matrices are cached.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._digests: dict[str, bytearray] = {}
        self._handles = Handles(os.O_RDONLY | os.O_CLOEXEC)
        self._dequantised: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.close()
        if kind is None:
            self.checkpoint.refuse_changes()

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in the file's dtype; it owns its memory.

        Raises:
            CheckpointError: the checkpoint has no such tensor, or its file was truncated.
        """
        info = self.info(name)
        if name in self.checkpoint.packed:
            return self._matrix(info).clone()
        out = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        if out.numel():
            self.read_bytes(info, 0, as_bytes(out))
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` (1-D, contiguous) with the elements from index `start` on, converted to its dtype.

        Raises:
            CheckpointError: as `tensor`. ValueError: the piece extends beyond the tensor.
        """
        info = self.info(name)
        if start < 0 or start + out.numel() > info.elements:
            raise ValueError(f"{name}: elements {start} to {start + out.numel()} of {info.elements}")
        if not out.numel():
            return
        dtype = TORCH_DTYPES[info.dtype]
        raw = out if out.dtype == dtype else torch.empty(out.numel(), dtype=dtype)
        self.read_bytes(info, start * dtype.itemsize, as_bytes(raw))
        if raw is not out:
            out.copy_(raw)

    def read_bytes(self, info: TensorInfo, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a tensor from `offset` on.

        Raises CheckpointError if the file was truncated, cannot be read, or changed since an earlier read.
        """
        if info.name in self.checkpoint.packed:
            out[:] = as_bytes(self._matrix(info))[offset : offset + len(out)]
            return
        self._read(info, offset, out)
        self._record(info, offset, out)

    def _matrix(self, info: TensorInfo) -> Tensor:
        """The matrix of a packed tensor, in the dtype of `info`."""
        with self._lock:
            if info.name not in self._dequantised:
                matrix = dequantise(self.checkpoint.packed[info.name], self._part).to(TORCH_DTYPES[info.dtype])
                if len(self._dequantised) == DEQUANTISED:
                    self._dequantised.pop(next(iter(self._dequantised)))
                self._dequantised[info.name] = matrix.contiguous()
            return self._dequantised[info.name]

    def _part(self, info: TensorInfo) -> Tensor:
        """A tensor as it is on disk."""
        out = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        if out.numel():
            self._read(info, 0, as_bytes(out))
            self._record(info, 0, as_bytes(out))
        return out

    def _read(self, info: TensorInfo, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes on disk of a tensor from `offset` on."""
        done = 0
        try:
            with self._handles.of(info.file) as handle:
                while done < len(out):
                    count = os.preadv(handle, [out[done:]], info.begin + offset + done)
                    if count == 0:
                        raise CheckpointError(
                            f"{info.file}: ends inside {info.name}; it got shorter since it was opened"
                        )
                    done += count
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot be read ({error.strerror}); read it again") from None

    def digests(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """Digests, by name on disk, of the tensors (of `names`, or all) that were read completely and in whole blocks.

        A packed tensor is represented by its parts on disk.
        """
        packed = self.checkpoint.packed
        parts = (part.name for name in names or () if name in packed for part in packed[name].parts.values())
        found = {}
        for name in sorted(self._digests) if names is None else (*names, *parts):
            blocks = self._digests.get(name, b"")
            digests = [bytes(blocks[at : at + DIGEST]) for at in range(0, len(blocks), DIGEST)]
            if digests and bytes(DIGEST) not in digests:
                found[name] = joined(digests)
        return found

    def _record(self, info: TensorInfo, offset: int, data: memoryview) -> None:
        """Keep the digests of whole blocks (the tensor's last one may be short); zeros stand for blocks not read.

        Raises CheckpointError if a block differs from an earlier read of it.
        """
        if offset % BLOCK or (len(data) % BLOCK and offset + len(data) != info.nbytes):
            return
        recorded = self._digests.setdefault(info.name, bytearray(-(-info.nbytes // BLOCK) * DIGEST))
        for number, digest in enumerate(block_digests(data), offset // BLOCK):
            place = slice(number * DIGEST, (number + 1) * DIGEST)
            if recorded[place] not in (digest, bytes(DIGEST)):
                raise CheckpointError(
                    f"{info.file}: {info.name} changed while it was read; run it again once nobody writes there"
                )
            recorded[place] = digest

    def info(self, name: str) -> TensorInfo:
        """The tensor's header entry."""
        try:
            return self.checkpoint.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.checkpoint.path}: has no tensor {name}") from None
