"""Upper bounds on the mean KL of unmeasured prompts, and how far gates may open under such a bound.

The KL of prompt i is X_i(t), in nats per token averaged over its answer, clipped at a cap c. t from 0 to 1 scales the
learned gates; t = 0 is the VLM itself. The n prompts are exchangeable with future ones, and were used neither to train
the gates nor to control α. Two kinds of bound on E X(t):

- `expectation`, conformal risk control (arXiv 2208.02814, theorem 1): t is chosen so that n/(n+1)·mean X(t) + c/(n+1)
  is within the budget; then E X(t) is within it on average over the n prompts and the next one.
- `confidence`, betting against every mean m (arXiv 2010.09686, there "diversified Kelly"): the capital
  mean_b Π(1 − b·(X_i − m)/(1 − m)), in units of the cap, reaches 1/δ with probability at most δ if the mean is m or
  more. Every m for which it does is rejected; then E X(t) is within the budget with probability 1 − δ over the n
  prompts. The bets b are constant, unlike the paper's predictable ones, so that the bound does not depend on the order
  of the prompts, which batches sort by length.

Values of t are tested upwards from 0 and the first failure ends the test, so no correction for multiple testing is
needed (fixed-sequence testing, arXiv 2110.01052). Conformal risk control requires X_i(t) to increase with t: X_i(t) is
replaced by its maximum over all smaller t that were tested, which can only raise the bound.

A bound says nothing about prompts of another kind, nor about the part of a KL above the cap: report both beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlmgraft.errors import NumericalError

Kind = Literal["expectation", "confidence"]
Bound = Callable[[NDArray[np.float64], float], float]
"""Function from KLs [n] and their cap to an upper bound on their mean."""
SCALINGS = tuple(step / 20 for step in range(1, 21))
"""The values of t that are tested."""

BETS = (0.25, 0.5, 0.9)
"""Shares of the capital that a KL at the cap loses; any from 0 to below 1 are valid. Large bets are tight where KLs are
far below the cap, small ones where there are thousands of prompts."""
BISECTIONS = 50


@dataclass(frozen=True)
class Certified:
    """t: scaling of the gates. bound: on E min(X(t), cap), nats per token; 0 at t = 0. mean: of the n clipped KLs.
    clipped: share of the n prompts at the cap."""

    t: float = 0.0
    bound: float = 0.0
    mean: float = 0.0
    clipped: float = 0.0


def certify(
    divergences: Callable[[float], ArrayLike],
    path: Iterable[float],
    budget: float,
    cap: float,
    bound: Bound,
) -> Certified:
    """The last t of the increasing `path` before the first whose bound exceeds the budget; 0 if the first one's does.

    divergences: from t to the KLs of the same n prompts in the same order. bound: from n KLs and the cap,
    `conformal_bound` or `betting_bound` at a level. No t beyond the first failure is measured. Raises
    NumericalError for a NaN.
    """
    passed = Certified()
    largest: NDArray[np.float64] | float = 0.0
    for t in path:
        largest = np.maximum(largest, _clip(divergences(t), cap))
        upper = bound(largest, cap)
        if upper > budget:
            break
        passed = Certified(t, upper, float(largest.mean()), float((largest >= cap).mean()))
    return passed


def bound_of(kind: Kind, level: float) -> Bound:
    """The bound of a kind; only "confidence" uses `level`."""
    return conformal_bound if kind == "expectation" else partial(betting_bound, level=level)


def conformal_bound(divergences: ArrayLike, cap: float) -> float:
    """n/(n+1)·mean + c/(n+1) of n KLs [n] clipped at the cap c; at least c/(n+1)."""
    clipped = _clip(divergences, cap)
    return float(clipped.sum() + cap) / (len(clipped) + 1)


def betting_bound(divergences: ArrayLike, cap: float, level: float) -> float:
    """Upper bound on the mean of n independent KLs [n] clipped at the cap, valid with probability `level` = 1 − δ.

    The capital increases with m: the rejected means are an interval; its lower end, found by bisection, is the bound.
    """
    x = _clip(divergences, cap) / cap
    bets, wanted = np.array(BETS)[:, None], math.log(len(BETS)) - math.log1p(-level)

    def refused(m: float) -> bool:
        return float(np.logaddexp.reduce(np.log1p(-bets * (x - m) / (1 - m)).sum(axis=1))) >= wanted

    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if refused(middle) else (middle, high)
    return high * cap


def _clip(divergences: ArrayLike, cap: float) -> NDArray[np.float64]:
    """KLs [n] clipped to between 0 (a KL of −1e-9 is rounding) and the cap."""
    x = np.asarray(divergences, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0 or np.isnan(x).any():
        nans = int(np.isnan(x).sum())
        raise NumericalError(f"divergences of shape {x.shape} with {nans} NaN: need one number per prompt")
    return x.clip(0, cap)
