"""Percentile bootstrap intervals over items (Efron, 1979); paired differences resample the items of both at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, all in the unit of the values."""

    mean: float
    low: float
    high: float

    def percent(self) -> str:
        """Such as "72.7 [69.1, 76.2]", in percent."""
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def bootstrap(groups: Sequence[ArrayLike], seed: int = 0) -> Estimate:
    """The mean over groups of their mean value, items resampled within each group.

    Args:
        groups: one array of values per task, so that tasks of different sizes count alike.
    Raises:
        ValueError: a group is empty.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays or any(array.size == 0 for array in arrays):
        raise ValueError(f"bootstrap needs at least one value per group, got sizes {[array.size for array in arrays]}")
    rng = np.random.default_rng(seed)
    draws = [array[rng.integers(array.size, size=(RESAMPLES, array.size))].mean(1) for array in arrays]
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return Estimate(float(np.mean([array.mean() for array in arrays])), float(low), float(high))
