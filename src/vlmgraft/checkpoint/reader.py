"""Reads tensors, whole or in pieces, from safetensors shards by `pread`: never memory-mapped, safe among threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor

from vlmgraft.checkpoint.handles import Handles
from vlmgraft.checkpoint.header import TensorInfo
from vlmgraft.checkpoint.index import Checkpoint
from vlmgraft.errors import CheckpointError

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
}


class Reader:
    """Context manager over the open files of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._handles = Handles(os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.close()

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in the file's dtype; it owns its memory.

        Raises:
            CheckpointError: the checkpoint has no such tensor, or its file got shorter.
        """
        info = self.info(name)
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
        """Fill `out` with the bytes of a tensor from `offset` on."""
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

    def info(self, name: str) -> TensorInfo:
        """The tensor's header entry."""
        try:
            return self.checkpoint.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.checkpoint.path}: has no tensor {name}") from None


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor with elements, writable, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
