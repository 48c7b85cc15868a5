"""Reads tensors of a checkpoint by `pread`: whole, or in chunks into a buffer that stays in the processor's cache.

Nothing is memory-mapped, so a tensor that was read owns its memory and its file may be replaced afterwards.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from vlmgraft.checkpoint.index import Checkpoint, TensorInfo
from vlmgraft.errors import CheckpointError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "I64": torch.int64,
    "U64": torch.uint64, "F64": torch.float64,
}  # fmt: skip
"""Safetensors codes as torch dtypes."""


class Reader:
    """Context manager over the open files of a checkpoint; may be shared by threads (`pread` keeps no position)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._handles: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def info(self, name: str) -> TensorInfo:
        """The header entry of a tensor; raises CheckpointError when there is none."""
        try:
            return self.checkpoint.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.checkpoint.path}: has no tensor {name}") from None

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in the file's dtype."""
        info = self.info(name)
        out = torch.empty(info.elements, dtype=TORCH_DTYPES[info.dtype])
        self.read_into(name, 0, out)
        return out.reshape(info.shape)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat contiguous tensor `out` with elements `start`, `start + 1`, … in the file's dtype."""
        info = self.info(name)
        if out.numel() == 0:
            return
        view = memoryview(out.view(torch.uint8).numpy())
        offset, handle = info.begin + start * out.element_size(), self._handle(info.file)
        while view:
            count = os.preadv(handle, [view], offset)
            if count == 0:
                raise CheckpointError(
                    f"{info.file}: ended while {name} was read; it was changed or truncated meanwhile"
                )
            offset, view = offset + count, view[count:]

    def _handle(self, file: Path) -> int:
        handle = self._handles.get(file)
        if handle is None:
            handle = self._handles.setdefault(file, os.open(file, os.O_RDONLY))
        return handle
