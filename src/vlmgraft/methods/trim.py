"""Magnitude thresholds that keep the largest share of one or many tensors, exact, without holding them.

The bits of |x| of a float32, read as an integer, are ordered as |x| is. A first pass counts their upper 11 bits
(exponent and three bits of mantissa); the bucket that holds the k-th largest is then known, and a second pass counts
the lower 20 bits of the values in that bucket alone. Two histograms, 2,048 and 1,048,576 counts, however many values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from vlmgraft.methods.base import TensorContext

if TYPE_CHECKING:
    from torch import Tensor

    from vlmgraft.methods.base import Passes

LOW_BITS = 20
COARSE, FINE = 1 << (31 - LOW_BITS), 1 << LOW_BITS


def rank_of(density: float, count: int) -> int:
    """How many of `count` values are kept at least: round(density · count), and one."""
    return max(1, min(count, round(density * count)))


def coarse_histogram(values: Tensor) -> Tensor:
    """Counts of the upper 11 magnitude bits: int64 [2048]."""
    bits = values.view(torch.int32).bitwise_and(0x7FFFFFFF).bitwise_right_shift_(LOW_BITS)
    return torch.bincount(bits, minlength=COARSE)


def low_bits(values: Tensor, bucket: int) -> Tensor:
    """The lower 20 magnitude bits of the values whose upper bits are `bucket`: int32; numpy selects them faster."""
    bits = values.view(torch.int32).bitwise_and(0x7FFFFFFF).numpy()
    return torch.from_numpy(bits[bits >> LOW_BITS == bucket] & (FINE - 1))


def find_from_top(histogram: Tensor, rank: int) -> tuple[int, int]:
    """(bin of the rank-th largest value, its rank among the values of that bin)."""
    above = histogram.flip(0).cumsum(0)
    place = int((above < rank).sum())
    return len(histogram) - 1 - place, rank - (int(above[place - 1]) if place else 0)


def to_float(bits: int) -> float:
    """The float32 with these bits."""
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


@dataclass
class _Search:
    """One threshold that is sought: counts, then its bucket and rank in there."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(COARSE, dtype=torch.int64))
    bucket: int = 0
    rank: int = 0

    def narrow(self, density: float) -> None:
        self.bucket, self.rank = find_from_top(self.counts, rank_of(density, int(self.counts.sum())))
        self.counts = torch.zeros(0, dtype=torch.int64)


TaskVectors = Callable[[Mapping[str, "Tensor"]], Mapping[str, "Tensor"]]


def find_thresholds(
    passes: Passes,
    task_vectors: TaskVectors,
    unit: Callable[[TensorContext], str],
    density: Callable[[TensorContext], float],
) -> dict[str, dict[str, float]]:
    """{unit: {source: threshold}}: the round(density·n)-th largest magnitude of each source's task vector in a unit.

    Two passes over the weights. Tensors of one unit follow each other, as do a tensor's chunks; the density is read
    from a unit's first chunk.
    """
    searches: dict[str, dict[str, _Search]] = {}

    def count(pieces: Mapping[str, Tensor], context: TensorContext) -> dict[str, Tensor]:
        return {source: coarse_histogram(tau) for source, tau in task_vectors(pieces).items()}

    for name, rows in groupby(passes.map(count), key=lambda row: unit(row[0])):
        found: dict[str, _Search] = {}
        share = 1.0
        for context, histograms in rows:
            share = share if found else density(context)
            for source, histogram in histograms.items():
                found.setdefault(source, _Search()).counts += histogram
        for search in found.values():
            search.narrow(share)
        searches[name] = found

    def select(pieces: Mapping[str, Tensor], context: TensorContext) -> dict[str, Tensor]:
        here = searches[unit(context)]
        return {source: low_bits(tau, here[source].bucket) for source, tau in task_vectors(pieces).items()}

    thresholds = {}
    for name, rows in groupby(passes.map(select), key=lambda row: unit(row[0])):
        thresholds[name] = _refine(searches[name], (selected for _, selected in rows))
    return thresholds


def _refine(searches: Mapping[str, _Search], rows: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """The exact thresholds of one unit from the low bits of the values in each one's bucket."""
    counts = {source: torch.zeros(FINE, dtype=torch.int64) for source in searches}
    for row in rows:
        for source, low in row.items():
            counts[source].index_add_(0, low, torch.ones(1, dtype=torch.int64).expand(len(low)))
    return {
        source: to_float(search.bucket << LOW_BITS | find_from_top(counts[source], search.rank)[0])
        for source, search in searches.items()
    }
