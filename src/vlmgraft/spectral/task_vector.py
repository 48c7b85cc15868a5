"""Task vectors τ = W_donor − W_base of an alignment, one matrix at a time, and fingerprints of their inputs."""

from __future__ import annotations

import hashlib
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from vlmgraft.alignment import AlignedTensor, Alignment, Source, assemble
from vlmgraft.checkpoint.index import Checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import AlignmentError, NumericalError, WeightsError
from vlmgraft.spectral.rank import check_matrix

SAMPLE_BLOCKS = 32
SAMPLE_BYTES = 4096
SETTLED = 2.0


class TaskVectors:
    """Context manager that reads task vectors from the checkpoints of an alignment.

    `names` are the VLM's names of the merged tensors, which must all be matrices or fused experts (AlignmentError
    otherwise).
    """

    def __init__(self, alignment: Alignment) -> None:
        if alignment.donor_base is None:
            raise AlignmentError("donor_base: missing; the task vector is the donor minus the model it was tuned from")
        self.alignment = alignment
        self._tensors = {tensor.name: tensor for tensor in alignment.merged}
        for name in self._tensors:
            check_matrix(name, alignment.vlm.tensors[name].shape)
        self._stack = ExitStack()
        self._readers: dict[str, Reader] = {}

    def __enter__(self) -> TaskVectors:
        for key in ("vlm", "donor", "donor_base"):
            self._readers[key] = self._stack.enter_context(Reader(getattr(self.alignment, key)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """VLM tensor names, in disk order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of τ, equal to the VLM tensor's."""
        return self.alignment.vlm.tensors[name].shape

    def role(self, name: str) -> str:
        """The tensor's canonical name inside the text model."""
        return self._tensors[name].role or name

    def load(self, name: str) -> Tensor:
        """τ of one tensor in float32; raises NumericalError naming the tensor when it is not finite.

        The norm of τ is finite only if both sides are, so that one reduction checks both.
        """
        tensor, shape = self._tensors[name], self.shape(name)
        sides = []
        for key in ("donor", "donor_base"):
            source = _source(tensor, key)
            fill = self._readers["vlm"].tensor(name) if source.layout.kind == "rows" else None
            sides.append(assemble(source, self._readers[key].tensor, shape, fill).float())
        tau = sides[0].sub_(sides[1])
        if not torch.isfinite(torch.linalg.vector_norm(tau)):
            self._refuse(name, tau)
        return tau

    def _refuse(self, name: str, tau: Tensor) -> None:
        """Raise for a τ that is not finite, naming the tensor on disk with the value; huge finite weights pass."""
        for key in ("donor", "donor_base"):
            source = _source(self._tensors[name], key)
            for part in source.names:
                if not torch.isfinite(self._readers[key].tensor(part).float()).all():
                    raise WeightsError(
                        f"{part} in {self._readers[key].info(part).file} ({key}): holds NaN or infinity; take a "
                        "checkpoint whose weights are finite"
                    )
        if not torch.isfinite(tau).all():
            raise NumericalError(f"{name}: donor − base is beyond float32")

    def digest(self, name: str) -> str:
        """Fingerprint of the inputs of τ: names, dtypes, shapes, layout and samples of the bytes.

        32 blocks of 4 KiB spread over each tensor, or all of a small one: training changes a tensor everywhere, and
        copying a checkpoint changes nothing. File times and paths are ignored.
        """
        state = hashlib.sha256(repr(self.shape(name)).encode())
        for key in ("donor", "donor_base"):
            source = _source(self._tensors[name], key)
            state.update(repr((key, source)).encode())
            for part in source.names:
                _sample(self._readers[key], part, state)
        return state.hexdigest()[:32]

    def digests(self, name: str) -> dict[str, dict[str, str]]:
        """Checkpoint → tensor on disk → digest of its bytes, for the tensors that `load` read for τ."""
        sources = {key: _source(self._tensors[name], key) for key in ("donor", "donor_base")}
        return {key: self._readers[key].digests(source.names) for key, source in sources.items()}

    def stamp(self) -> str:
        """Identifies the inputs without reading them: which tensors are paired, and the `file_stamp` of donor and
        base; "" where one of the two has none."""
        stamps = [file_stamp(getattr(self.alignment, key)) for key in ("donor", "donor_base")]
        pairs = [
            (tensor.name, self.shape(tensor.name), tensor.donor, tensor.donor_base) for tensor in self._tensors.values()
        ]
        return hashlib.sha256(repr((stamps, pairs)).encode()).hexdigest()[:32] if all(stamps) else ""


def zero_everywhere(alignment: Alignment) -> AlignmentError:
    """The error for a task vector that is zero in all merged tensors: what, where, and what to change in the recipe."""
    groups = ", ".join(dict.fromkeys(tensor.group for tensor in alignment.merged))
    base = alignment.donor_base.path if alignment.donor_base is not None else "its base"
    return AlignmentError(
        f"the task vector is zero: {alignment.donor.path} and {base} hold the same weights in all "
        f"{len(alignment.merged)} tensors to be merged ({groups}); write other modules or layers, or as donor_base the "
        "model that the donor was tuned from"
    )


def task_vector(alignment: Alignment, name: str) -> Tensor:
    """τ of one tensor in float32 [out, in]; for many tensors keep a TaskVectors open."""
    with TaskVectors(alignment) as taus:
        return taus.load(name)


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Fingerprint of a whole checkpoint: its config, and names, dtypes, shapes and samples of all its tensors."""
    state = hashlib.sha256(repr(sorted(checkpoint.config.items(), key=str)).encode())
    with Reader(checkpoint) as reader:
        for name in checkpoint.tensors:
            state.update(name.encode())
            _sample(reader, name, state)
    return state.hexdigest()[:20]


def file_stamp(checkpoint: Checkpoint) -> str:
    """A stamp that changes whenever a file of the checkpoint is written, replaced or touched; no file is opened.

    It trusts the file system's inode, size, and times of modification and of change (which no program can set) of every
    file, together with the current config and headers. Equal stamps mean equal content; if stamps differ, content is
    compared by `checkpoint_digest` or `TaskVectors.digest`. A file that changed within the last `SETTLED` seconds has
    no stamp ("", never trusted): file times are too coarse to show a further change.
    """
    state = hashlib.sha256(repr(sorted(checkpoint.config.items(), key=str)).encode())
    for info in checkpoint.tensors.values():
        state.update(repr((info.name, info.dtype, info.shape, info.begin, info.file.name)).encode())
    newest = 0.0
    for file in checkpoint.files:
        stat = file.stat()
        newest = max(newest, stat.st_ctime)
        state.update(repr((file.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)).encode())
    return state.hexdigest()[:20] if time.time() - newest > SETTLED else ""


def _source(tensor: AlignedTensor, key: str) -> Source:
    source: Source | None = getattr(tensor, key)
    if source is None:
        raise AlignmentError(f"{tensor.name}: {key} has no tensor for it; leave it out of `modules`")
    return source


def _sample(reader: Reader, name: str, state: Any) -> None:
    info = reader.info(name)
    state.update(repr((info.dtype, info.shape)).encode())
    step = max(SAMPLE_BYTES, (info.nbytes - SAMPLE_BYTES) // (SAMPLE_BLOCKS - 1))
    for offset in range(0, info.nbytes, step):
        block = memoryview(bytearray(min(SAMPLE_BYTES, info.nbytes - offset)))
        reader.read_bytes(info, offset, block)
        state.update(block)
