"""Reads tensors, whole or in pieces, from safetensors shards by `pread`: never memory-mapped, safe among threads.

What is read is digested on the way, block by block, so that a receipt can say what it was made from without another
read.
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
"""Matrices of a checkpoint that are kept: threads work at one tensor, or at two that follow each other."""
DIGEST = 16
"""Bytes of the digest of a block."""


class Reader:
    """Context manager over the open files of a checkpoint; a clean exit raises CheckpointError where they changed.

    Quantised tensors are read as what they stand for; the last few such matrices are kept.
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
            CheckpointError: the checkpoint has no such tensor, or its file got shorter.
        """
        info = self.info(name)
        if name in self.checkpoint.packed:
            return self._matrix(info).clone()
        out = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        if out.numel():
            self.read_bytes(info, 0, as_bytes(out))
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` (1-D, contiguous) with the elements from number `start` on, in the dtype of `out`.

        Raises:
            CheckpointError: as `tensor`. ValueError: the piece reaches beyond the tensor.
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

        Raises CheckpointError where the file got shorter, cannot be read, or holds other bytes than before.
        """
        if info.name in self.checkpoint.packed:
            out[:] = as_bytes(self._matrix(info))[offset : offset + len(out)]
            return
        self._read(info, offset, out)
        self._record(info, offset, out)

    def _matrix(self, info: TensorInfo) -> Tensor:
        """The matrix that a quantised tensor stands for, in the dtype of `info`."""
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
        """The digests of what was read whole, in whole blocks, by its name on disk; those of `names` or of all.

        Of a tensor that is made of several on disk, theirs.
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

        Raises CheckpointError where a block was read before and was another.
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
