"""Exact magnitude thresholds that keep the largest share of one or many tensors, without holding the tensors.

The bits of a float32 |x|, read as an integer, have the order of |x|. A search keeps a bracket of such integers that
contains the k-th largest. A sample of every tensor gives a narrow first bracket. A pass over all weights then counts
the values above the bracket and, integer by integer, inside it, which determines the threshold. If the sample misled,
or the bracket has more integers than the histogram has bins, another pass takes the bin that was found as its bracket:
from all 2³¹ integers two passes suffice. The histogram has 2²⁰ bins, whatever the number of values.

Differences of bfloat16 values lie on a grid, so the first bracket often holds a single value. A caller that can verify
it later (`Tally`) may use it as a guess and skip the pass.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlmgraft.methods.base import TensorContext

if TYPE_CHECKING:
    from torch import Tensor

    from vlmgraft.methods.base import Passes

BINS, ALL = 1 << 20, 1 << 31
SAMPLE = 64
"""The sample takes one element in this many."""
MARGIN = 32.0
"""Half-width of the sample's bracket, in standard deviations for independent draws (neighbours are not)."""


def rank_of(density: float, count: int) -> int:
    """How many of `count` values are at least to be kept: round(density · count), but not fewer than one."""
    return max(1, min(count, round(density * count)))


def find_from_top(histogram: np.ndarray, rank: int) -> int:
    """The bin of the rank-th largest value."""
    above = histogram[::-1].cumsum()
    return len(histogram) - 1 - int(np.searchsorted(above, rank))


def to_float(bits: int) -> float:
    """The float32 with these bits."""
    return float(np.array(bits, dtype=np.int32).view(np.float32))


@dataclass(frozen=True)
class Bracket:
    """The integers from `low` to below `high`, which contain the threshold's bits; initially all integers."""

    low: int = 0
    high: int = ALL

    @property
    def shift(self) -> int:
        """Number of low bits that a bin of the histogram ignores."""
        return max(0, math.ceil(math.log2((self.high - self.low) / BINS)))

    @property
    def size(self) -> int:
        """Bins of the histogram."""
        return (self.high - self.low - 1 >> self.shift) + 1

    @property
    def exact(self) -> bool:
        """Whether one integer is left."""
        return self.high - self.low == 1

    def bins(self, first: int, last: int) -> Bracket:
        """The bracket that these bins cover."""
        return Bracket(self.low + (first << self.shift), min(self.high, self.low + (last + 1 << self.shift)))

    def count(self, values: Tensor) -> ChunkCounts:
        """Count float32 values; overwrites them."""
        bits = values.view(torch.int32).bitwise_and_(0x7FFFFFFF).numpy()
        above, inside = 0, bits
        if self.high < ALL or self.low:
            bits -= np.int32(self.low)
            width = min(self.high, ALL - 1) - self.low
            above = int(np.count_nonzero(bits >= np.int32(width)))
            mask = bits.view(np.uint32) < np.uint32(width)
            number = int(np.count_nonzero(mask))
            first = bits[mask.argmax() :][:1]
            if number and int(np.count_nonzero(bits == first)) == number:  # differences of bfloat16 lie on a grid
                return ChunkCounts(len(bits), above, first >> self.shift, number)
            inside = bits.compress(mask)  # six times as fast as indexing
        return ChunkCounts(len(bits), above, inside >> self.shift)


@dataclass
class ChunkCounts:
    """Counts of one chunk: values, values above the bracket, and bins of those inside, each counted `times` times."""

    total: int
    above: int
    bins: np.ndarray
    times: int = 1


class _Search:
    """One threshold search: its bracket, and the counts of the current pass."""

    def __init__(self) -> None:
        self.bracket = Bracket()
        self._restart()

    def _restart(self) -> None:
        self.total = self.above = 0
        self.histogram = np.zeros(0, dtype=np.int64)

    def add(self, counts: ChunkCounts) -> None:
        if not len(self.histogram):
            self.histogram = np.zeros(self.bracket.size, dtype=np.int64)
        self.total += counts.total
        self.above += counts.above
        np.add.at(self.histogram, counts.bins, counts.times)

    def guess(self, density: float) -> None:
        """Narrow the bracket after a pass over a sample."""
        rank = rank_of(density, self.total)
        margin = math.ceil(MARGIN * math.sqrt(self.total * density * (1 - density)))
        first = find_from_top(self.histogram, min(self.total, rank + margin))
        self.bracket = self.bracket.bins(first, find_from_top(self.histogram, max(1, rank - margin)))
        self._restart()

    def settle(self, density: float) -> None:
        """Narrow the bracket after a second pass over the sample: to one integer, if the sample has no other in it."""
        inside = np.flatnonzero(self.histogram)
        if len(inside) == 1:
            self.bracket = self.bracket.bins(int(inside[0]), int(inside[0]))
        self._restart()

    def narrow(self, density: float) -> None:
        """Narrow the bracket after a pass over all values, or move it if it missed the threshold."""
        rank = rank_of(density, self.total)
        if rank <= self.above:
            self.bracket = Bracket(self.bracket.high, ALL)
        elif rank > self.above + int(self.histogram.sum()):
            self.bracket = Bracket(0, self.bracket.low)
        else:
            bin_ = find_from_top(self.histogram, rank - self.above)
            self.bracket = self.bracket.bins(bin_, bin_)
        self._restart()


TaskVectors = Callable[[Mapping[str, "Tensor"]], Mapping[str, "Tensor"]]


def find_thresholds(
    passes: Passes,
    task_vectors: TaskVectors,
    unit: Callable[[TensorContext], str],
    density: Callable[[str, TensorContext], float],
    *,
    guess: bool = False,
) -> dict[str, dict[str, float]]:
    """{unit: {source: threshold}}: the round(density·n)-th largest magnitude of each source's task vector in a unit.

    density: of a source in a tensor; a source that is kept in full has the threshold 0. guess: use a threshold that
    the sample determines uniquely, without a pass over all weights.

    Makes one pass over the weights after a sample, and up to two more if the sample was not representative. Tensors of
    one unit follow each other, as do a tensor's chunks; the density is read from a unit's first chunk.
    """
    searches: dict[str, dict[str, _Search]] = {}

    def count(pieces: Mapping[str, Tensor], context: TensorContext) -> dict[str, ChunkCounts]:
        known = searches.get(unit(context), {})
        return {
            source: (known[source].bracket if source in known else Bracket()).count(tau)
            for source, tau in task_vectors(pieces).items()
            if density(source, context) < 1 and (source not in known or not known[source].bracket.exact)
        }

    def run(sample: int, close: Callable[[_Search, float], None]) -> None:
        for name, rows in groupby(passes.map(count, sample=sample), key=lambda row: unit(row[0])):
            unit_searches, shares = searches.setdefault(name, {}), dict[str, float]()
            for context, counts in rows:
                for source, counted in counts.items():
                    if source not in shares:
                        shares[source] = density(source, context)
                    unit_searches.setdefault(source, _Search()).add(counted)
            for source, share in shares.items():
                if unit_searches[source].total:
                    close(unit_searches[source], share)

    run(SAMPLE, _Search.guess)
    if guess:
        run(SAMPLE, _Search.settle)
    while not all(search.bracket.exact for unit_searches in searches.values() for search in unit_searches.values()):
        run(1, _Search.narrow)
    return {
        name: defaultdict(float, {source: to_float(one.bracket.low) for source, one in unit_searches.items()})
        for name, unit_searches in searches.items()
    }


@dataclass(frozen=True)
class Tally:
    """Counts over one task vector or a part of it: magnitudes above a threshold, at or above it, and all."""

    above: int = 0
    kept: int = 0
    total: int = 0

    @staticmethod
    def of(trimmed: Tensor, threshold: float) -> Tally:
        """Counts over trimmed values: those below the threshold are 0."""
        values = trimmed.numpy()
        kept = int(np.count_nonzero(values != 0)) if threshold > 0 else values.size
        return Tally(int(np.count_nonzero(np.abs(values) > threshold)), kept, values.size)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.above + other.above, self.kept + other.kept, self.total + other.total)

    def bears_out(self, density: float) -> bool:
        """Whether the threshold is the round(density·n)-th largest magnitude, or all is kept."""
        return density >= 1 or self.above < rank_of(density, self.total) <= self.kept
