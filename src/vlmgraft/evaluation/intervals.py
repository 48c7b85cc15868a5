"""95 % intervals over items: the percentile bootstrap (Efron, 1979) and Wilson's score interval (1927).

Paired differences resample the items of both models together. If all answers are right, or all wrong, the bootstrap
interval has zero width; Wilson's interval is used instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, all in the unit of the values."""

    mean: float
    low: float
    high: float

    def percent(self) -> str:
        """The estimate in percent, such as "72.7 [69.1, 76.2]"."""
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def signed(self) -> str:
        """A difference in percentage points, such as "+2.1 [-0.4, +4.6]"."""
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def bootstrap(groups: Sequence[ArrayLike], seed: int = 0, *, level: float = LEVEL) -> Estimate:
    """The mean of the groups' means, with items resampled within each group.

    Args:
        groups: one array of values per task, so that tasks of different sizes have equal weight.
        level: confidence level of the interval, 95 % by default.
    Raises:
        ValueError: a group is empty.
    """
    from scipy import stats

    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays or any(array.size == 0 for array in arrays):
        raise ValueError(f"bootstrap needs at least one value per group, got sizes {[array.size for array in arrays]}")
    centre = _mean_of_means(*arrays)
    if all(np.ptp(array) == 0 for array in arrays):
        return Estimate(float(centre), float(centre), float(centre))
    # scipy rejects samples of one value; if the value is repeated, all resamples stay the same
    samples = [array if array.size > 1 else np.repeat(array, 2) for array in arrays]
    how = {"n_resamples": RESAMPLES, "confidence_level": level, "method": "percentile", "vectorized": True}
    result = stats.bootstrap(samples, _mean_of_means, rng=np.random.default_rng(seed), **how)
    low, high = result.confidence_interval
    return Estimate(float(centre), float(low), float(high))


def score_interval(groups: Sequence[ArrayLike], seed: int = 0) -> Estimate:
    """`bootstrap` of scores in [0, 1]; where every group is all 1 or all 0, the mean of the groups' Wilson intervals.

    Raises:
        ValueError: a group is empty.
    """
    estimate = bootstrap(groups, seed)
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not all(np.ptp(array) == 0 and array[0] in (0, 1) for array in arrays):
        return estimate
    from scipy import stats

    tests = [stats.binomtest(int(array.sum()), array.size) for array in arrays]
    low, high = np.mean([test.proportion_ci(LEVEL, method="wilson") for test in tests], axis=0)
    return Estimate(estimate.mean, float(low), float(high))


def _mean_of_means(*groups: Float[np.ndarray, "*resamples items"], axis: int = -1) -> Float[np.ndarray, "*resamples"]:
    return np.mean([group.mean(axis) for group in groups], axis=0)
