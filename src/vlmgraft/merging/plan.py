"""What a merge reads and writes, its time and its memory, from headers alone; no torch, work linear in the tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmgraft.alignment.layouts import Source
from vlmgraft.checkpoint.header import ITEM_SIZES, TensorSpec, count_shards
from vlmgraft.errors import AlignmentError
from vlmgraft.storage.resources import collection_paused

if TYPE_CHECKING:
    from vlmgraft.alignment import AlignedTensor, Alignment
    from vlmgraft.methods.base import Method

CHUNK = 1 << 18
"""Elements per piece: four float32 pieces stay in a core's cache; whole tensors take ten times as long per element."""

WIDEST = max(ITEM_SIZES.values())
OTHERS = ("donor", "donor_base", "vlm_base")
DEQUANTISING = 24
"""Bytes per element of the largest quantised matrix: float32 values, scales and product, and two kept results."""
ASSUMED_RATE = 10**9
"""Bytes read and written per second that `plan_merge` assumes: a disk of 1 GB/s, or two cores on cached files."""


@dataclass(frozen=True)
class MergePlan:
    """A merge before it runs. The output has exactly the VLM's tensors, so it is complete by construction.

    merged, kept, excluded: tensors by verdict. read, written: bytes, read over all passes. files: shards written. rate:
    bytes per second assumed for `seconds`. memory: upper bound on private bytes, besides those of the libraries.
    """

    method: str
    merged: int
    kept: int
    excluded: int
    read: int
    written: int
    files: int
    rate: int
    seconds: float
    memory: int


@collection_paused()
def plan_merge(
    alignment: Alignment,
    method: Method | type[Method],
    shard_size: int = 5 * 10**9,
    *,
    threads: int = 2,
    rate: int = ASSUMED_RATE,
    float32: bool = False,
) -> MergePlan:
    """Plan a merge from headers; nothing is opened or written.

    Args:
        shard_size: bytes of data per output file, at most.
        float32: merged tensors are written in float32.
        rate: bytes read and written per second, for the time estimate. Methods that decompose matrices take longer.
    Raises:
        AlignmentError: a checkpoint that the method needs is missing. ValueError: a shard size or rate below 1.
    """
    if shard_size < 1 or rate < 1:
        raise ValueError(f"shard_size {shard_size} and rate {rate} must be at least 1")
    check_needs(alignment, method)
    counts = {"merged": 0, "kept": 0, "excluded": 0}
    pieces, whole, again = 0, 0, 0
    for tensor in alignment.tensors:
        counts[tensor.verdict] += 1
        if tensor.verdict != "merged":
            continue
        read = _bytes_read(alignment, tensor, method.reads_sources)
        again += read
        pieces += read - alignment.vlm.tensors[tensor.name].nbytes
        if not streamed(tensor, method):
            whole = max(whole, alignment.vlm.tensors[tensor.name].elements)
    specs = written_specs(alignment, float32)
    written = sum(spec.nbytes for spec in specs)
    total = alignment.vlm.nbytes + pieces + method.passes * again
    files = count_shards([spec.nbytes for spec in specs], shard_size)
    seconds, memory = (total + written) / rate, _memory(alignment, whole, threads, method.reads_sources)
    return MergePlan(
        method.name, **counts, read=total, written=written, files=files, rate=rate, seconds=seconds, memory=memory
    )


def written_specs(alignment: Alignment, float32: bool = False) -> list[TensorSpec]:
    """Name, dtype and shape of every output tensor: as in the VLM, but with `float32` merged tensors are float32."""
    wide = {tensor.name for tensor in alignment.tensors if float32 and tensor.verdict == "merged"}
    return [
        TensorSpec(info.name, "F32" if info.name in wide else info.dtype, info.shape)
        for info in alignment.vlm.tensors.values()
    ]


def check_needs(alignment: Alignment, method: Method | type[Method]) -> None:
    """Raise AlignmentError when a checkpoint that the method needs was not given."""
    for key in sorted(method.needs):
        if getattr(alignment, key) is None:
            raise AlignmentError(f"{key}: method {method.name} needs it; give it in the recipe")


def sources_of(tensor: AlignedTensor) -> dict[str, Source]:
    """The sources of a tensor in checkpoints other than the VLM, by checkpoint."""
    found = {key: getattr(tensor, key) for key in OTHERS}
    return {key: source for key, source in found.items() if source is not None}


def lines_up(tensor: AlignedTensor) -> bool:
    """Whether all sources have the VLM's element order on disk (missing rows aside), so that their chunks line up."""
    return all(
        source is None or source.layout.kind in ("whole", "rows")
        for source in (tensor.donor, tensor.donor_base, tensor.vlm_base)
    )


def streamed(tensor: AlignedTensor, method: Method | type[Method]) -> bool:
    """Whether a tensor is merged chunk by chunk from the files, without being held whole."""
    return not method.whole_tensors and lines_up(tensor)


def _bytes_read(alignment: Alignment, tensor: AlignedTensor, sources: bool) -> int:
    """Bytes of a merged tensor in all checkpoints; without `sources`, of the VLM's and float32 factors of full rank."""
    info = alignment.vlm.tensors[tensor.name]
    total = info.nbytes
    if not sources:
        experts, (m, n) = math.prod(info.shape[:-2]), info.shape[-2:]
        return total + 4 * experts * min(m, n) * (m + n + 1)
    for checkpoint, source in (
        (alignment.donor, tensor.donor),
        (alignment.donor_base, tensor.donor_base),
        (alignment.vlm_base, tensor.vlm_base),
    ):
        if checkpoint is not None and source is not None:
            for name in source.names:
                total += checkpoint.tensors[name].nbytes
    return total


def _memory(alignment: Alignment, whole: int, threads: int, sources: bool) -> int:
    """Memory of every thread: buffers, and whole tensors of `whole` elements where a tensor cannot be streamed.

    Such a tensor is held in float32 for every checkpoint, once more in the files' dtype, and as result and change.
    """
    others = sum(getattr(alignment, key) is not None for key in OTHERS) if sources else 2  # or U and Vh
    opened = [getattr(alignment, key) for key in ("vlm", *(OTHERS if sources else ()))]
    largest = [max(one.tensors[name].elements for name in one.packed) for one in opened if one and one.packed]
    keys = 1 + others
    workspace = CHUNK * (keys * (WIDEST + 4) + WIDEST + 4)
    dequantised = sum(DEQUANTISING * elements for elements in largest)
    return threads * (workspace + 4 * CHUNK * 4 + whole * (keys * (4 + WIDEST // 2) + 8)) + dequantised
