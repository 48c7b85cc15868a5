"""Task vectors τ = W_donor − W_base of an alignment, one matrix at a time, and fingerprints of what they came from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vlmgraft.alignment import AlignedTensor, Alignment, Source, assemble
from vlmgraft.checkpoint.index import Checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import AlignmentError, NumericalError

SAMPLE_BLOCKS = 32
SAMPLE_BYTES = 4096


class TaskVectors:
    """Context manager over the open checkpoints of an alignment.

    `names` are the VLM's names of the merged tensors, which must all be matrices or fused experts (AlignmentError
    otherwise).
    """

    def __init__(self, alignment: Alignment) -> None:
        if alignment.donor_base is None:
            raise AlignmentError("donor_base: missing; the task vector is the donor minus the model it was tuned from")
        self.alignment = alignment
        self._tensors = {tensor.name: tensor for tensor in alignment.merged}
        for name in self._tensors:
            shape = alignment.vlm.tensors[name].shape
            if len(shape) not in (2, 3) or 0 in shape:
                raise AlignmentError(
                    f"{name}: shape {shape} is not a matrix and has no singular directions; leave it out of `modules`"
                )
        self._stack = ExitStack()
        self._read: dict[str, Callable[[str], Tensor]] = {}

    def __enter__(self) -> TaskVectors:
        for key in ("vlm", "donor", "donor_base"):
            self._read[key] = self._stack.enter_context(Reader(getattr(self.alignment, key))).tensor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """VLM tensor names, in disk order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of τ: the VLM tensor's."""
        return self.alignment.vlm.tensors[name].shape

    def role(self, name: str) -> str:
        """The tensor's canonical name inside the text model."""
        return self._tensors[name].role or name

    def load(self, name: str) -> Tensor:
        """τ of one tensor in float32; raises NumericalError naming the tensor when it is not finite."""
        tensor, shape = self._tensors[name], self.shape(name)
        sides = []
        for key in ("donor", "donor_base"):
            source = _source(tensor, key)
            fill = self._read["vlm"](name) if source.layout.kind == "rows" else None
            side = assemble(source, self._read[key], shape, fill).float()
            if not torch.isfinite(side).all():
                file = getattr(self.alignment, key).tensors[source.names[0]].file
                raise NumericalError(
                    f"{', '.join(source.names)} in {file} ({key}): holds NaN or infinity; take a checkpoint whose "
                    "weights are finite"
                )
            sides.append(side)
        return sides[0].sub_(sides[1])

    def digest(self, name: str) -> str:
        """Fingerprint of the inputs of τ: names, dtypes, shapes, layout and samples of the bytes.

        32 blocks of 4 KiB spread over each tensor, or all of a small one: a tensor that was trained differs everywhere,
        and copying a checkpoint changes nothing. File times and paths play no part.
        """
        state = hashlib.sha256(repr(self.shape(name)).encode())
        for key in ("donor", "donor_base"):
            source, checkpoint = _source(self._tensors[name], key), getattr(self.alignment, key)
            state.update(repr((key, source)).encode())
            for part in source.names:
                _sample(checkpoint, part, state)
        return state.hexdigest()[:32]


def task_vector(alignment: Alignment, name: str) -> Tensor:
    """τ of one tensor in float32 [out, in]; for many tensors keep a TaskVectors open."""
    with TaskVectors(alignment) as taus:
        return taus.load(name)


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Fingerprint of a whole checkpoint: its config, and names, dtypes, shapes and samples of all its tensors."""
    state = hashlib.sha256(repr(sorted(checkpoint.config.items(), key=str)).encode())
    for name in checkpoint.tensors:
        state.update(name.encode())
        _sample(checkpoint, name, state)
    return state.hexdigest()[:20]


def _source(tensor: AlignedTensor, key: str) -> Source:
    source: Source | None = getattr(tensor, key)
    if source is None:
        raise AlignmentError(f"{tensor.name}: {key} has no tensor for it; leave it out of `modules`")
    return source


def _sample(checkpoint: Checkpoint, name: str, state: Any) -> None:
    info = checkpoint.tensors[name]
    state.update(repr((info.dtype, info.shape)).encode())
    step = max(SAMPLE_BYTES, (info.nbytes - SAMPLE_BYTES) // (SAMPLE_BLOCKS - 1))
    handle = os.open(info.file, os.O_RDONLY)
    try:
        for offset in range(0, info.nbytes, step):
            state.update(os.pread(handle, min(SAMPLE_BYTES, info.nbytes - offset), info.begin + offset))
    finally:
        os.close(handle)
