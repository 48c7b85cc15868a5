"""How far donor and VLM have moved from their bases, per layer and module group.

DRIFT (arXiv 2510.15050) finds merging harmless if the donor's task vector is small and does not oppose the VLM's own,
and harmful if the two differ much; it gives no thresholds. Measured here, over all tensors that are merged:

    donor_norm ‖τ‖, τ = W_donor − W_base        vlm_norm ‖τ_vlm‖, τ_vlm = W_vlm − W_vlm_base
    weight_norm ‖W_vlm‖                          cosine cos(τ_vlm, τ)
    unchanged: share of the entries of τ that are exactly 0

Without `vlm_base`, τ_vlm is taken from `donor_base`: exact if both models descend from one base, otherwise it includes
the difference of the two bases. Norms are over all tensors of a row. Sums are float32 within a chunk of 65,536
elements, which fits the cache, and float64 over chunks: accurate to about five digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from vlmgraft.alignment.align import AlignedTensor, Alignment
from vlmgraft.alignment.layouts import assemble
from vlmgraft.errors import AlignmentError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 16


@dataclass(frozen=True)
class Distance:
    """One row: a module group of one layer (None outside the layers), with its norms and cosine."""

    layer: int | None
    group: str
    weight_norm: float
    donor_norm: float
    vlm_norm: float
    cosine: float
    unchanged: float = 0.0

    @property
    def ratio(self) -> float:
        """‖τ‖ / ‖W_vlm‖."""
        return self.donor_norm / self.weight_norm if self.weight_norm else math.inf

    @property
    def vlm_ratio(self) -> float:
        """‖τ_vlm‖ / ‖W_vlm‖."""
        return self.vlm_norm / self.weight_norm if self.weight_norm else math.inf


@dataclass(frozen=True)
class Extent:
    """Summary of the rows: medians and extremes, with the row of each extreme."""

    median_ratio: float
    largest_ratio: float
    largest_at: str
    median_vlm_ratio: float
    smallest_cosine: float
    smallest_at: str

    def __str__(self) -> str:
        return (
            f"‖τ‖/‖W‖ {self.median_ratio:.3f} in the median row, at most {self.largest_ratio:.3f} ({self.largest_at}); "
            f"‖τ_vlm‖/‖W‖ {self.median_vlm_ratio:.3f} in the median row; cosine of τ and τ_vlm at least "
            f"{self.smallest_cosine:.3f} ({self.smallest_at}); two unrelated matrices of one norm would be 1.414 apart"
        )


def measure_distances(
    alignment: Alignment, progress: Callable[[int, int, str], None] | None = None
) -> tuple[Distance, ...]:
    """One row per layer and module group of the tensors that `alignment` merges, layers in the order of their numbers.

    Raises:
        AlignmentError: there is no donor_base to take the task vector from.
    """
    if alignment.donor_base is None:
        raise AlignmentError("distances need donor_base: the donor's task vector is its difference from it")
    sums: dict[tuple[int | None, str], list[float]] = {}
    with ExitStack() as stack:
        read = _Readers(alignment, stack)
        for number, tensor in enumerate(alignment.merged):
            row = sums.setdefault((tensor.layer, tensor.group), [0.0] * 6)
            for chunk in read.chunks(tensor):
                row[:] = [total + float(part) for total, part in zip(row, _products(*chunk), strict=True)]
            if progress is not None:
                progress(number + 1, len(alignment.merged), tensor.name)
    rows = (_row(layer, group, *values) for (layer, group), values in sums.items())
    return tuple(sorted(rows, key=lambda row: (row.layer is None, row.layer or 0)))


def extent_of(rows: Sequence[Distance]) -> Extent:
    """Summarise the rows. They give no threshold for harmless merges: whether a merge is harmless must be measured."""
    largest = max(rows, key=lambda row: row.ratio)
    smallest = min(rows, key=lambda row: row.cosine)
    return Extent(
        median(row.ratio for row in rows),
        largest.ratio,
        _where(largest),
        median(row.vlm_ratio for row in rows),
        smallest.cosine,
        _where(smallest),
    )


def _where(row: Distance) -> str:
    return f"{row.group} of layer {row.layer}" if row.layer is not None else row.group


def _row(
    layer: int | None, group: str, weight: float, donor: float, vlm: float, dot: float, zeros: float, entries: float
) -> Distance:
    norms = math.sqrt(donor) * math.sqrt(vlm)
    cosine = dot / norms if norms else 0.0
    share = zeros / entries if entries else 0.0
    return Distance(layer, group, math.sqrt(weight), math.sqrt(donor), math.sqrt(vlm), cosine, share)


def _products(vlm: Tensor, donor: Tensor, base: Tensor, vlm_base: Tensor) -> tuple[Tensor, ...]:
    """‖W‖², ‖τ‖², ‖τ_vlm‖², ⟨τ_vlm, τ⟩, zeros of τ and entries of a chunk; float64 would take 12 times as long."""
    tau, own = donor - base, vlm - vlm_base
    entries = tau.new_tensor(tau.numel())
    return vlm.dot(vlm), tau.dot(tau), own.dot(own), own.dot(tau), entries - tau.count_nonzero(), entries


class _Readers:
    """Readers of all checkpoints; gives matching float32 chunks of one aligned tensor."""

    def __init__(self, alignment: Alignment, stack: ExitStack) -> None:
        from vlmgraft.checkpoint.reader import Reader

        self._keys = ("donor", "donor_base", *(("vlm_base",) if alignment.vlm_base is not None else ()))
        self._readers = [stack.enter_context(Reader(getattr(alignment, key))) for key in ("vlm", *self._keys)]
        self._vlm = alignment.vlm

    def chunks(self, tensor: AlignedTensor) -> Iterator[tuple[Tensor, ...]]:
        """(VLM, donor, donor_base, vlm_base or donor_base) as flat float32 pieces; raises CheckpointError."""
        for pieces in self._pieces(tensor):
            yield pieces if len(pieces) == 4 else (*pieces, pieces[2])

    def _pieces(self, tensor: AlignedTensor) -> Iterator[tuple[Tensor, ...]]:
        import torch

        sources = [source for key in self._keys if (source := getattr(tensor, key)) is not None]
        info = self._vlm.tensors[tensor.name]
        if not all(source.streamable for source in sources):
            own = self._readers[0].tensor(tensor.name)
            pairs = zip(sources, self._readers[1:], strict=True)
            others = [assemble(source, reader.tensor, info.shape, fill=own) for source, reader in pairs]
            yield from zip(*(whole.float().flatten().split(CHUNK) for whole in (own, *others)), strict=True)
            return
        names = [tensor.name, *(source.names[0] for source in sources)]
        total = math.prod(info.shape)
        for start in range(0, total, CHUNK):
            pieces = tuple(torch.empty(min(CHUNK, total - start)) for _ in names)
            for name, reader, piece in zip(names, self._readers, pieces, strict=True):
                reader.read_into(name, start, piece)
            yield pieces
