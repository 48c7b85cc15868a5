"""Upper bounds on the mean drift of prompts that nobody has measured, and how far gates may open under such a bound.

The drift of prompt i is X_i(t), nats per token averaged over its answer, clipped at a cap c. t from 0 to 1 scales the
learned gates; t = 0 is the VLM itself. The n prompts are exchangeable with those to come, and neither the gates nor the
control of α has seen them. Two kinds of bound on E X(t):

- `expectation`, conformal risk control (arXiv 2208.02814, theorem 1): t is chosen so that n/(n+1)·mean X(t) + c/(n+1)
  is within the budget; then E X(t) is within it on average over the n prompts and the next one.
- `confidence`, betting against every mean m (arXiv 2010.09686, there "diversified Kelly"): the capital
  mean_b Π(1 − b·(X_i − m)/(1 − m)), in units of the cap, reaches 1/δ with probability δ at most if the mean is m or
  more, so that every m where it did is refused; then E X(t) is within the budget with probability 1 − δ over the n
  prompts. Constant bets b, unlike the paper's predictable ones, do not depend on the order of the prompts, which
  batches sort by length.

t is tested in a fixed order from 0 up and the first failure ends the test, so that no correction for several tests is
due (fixed-sequence testing, arXiv 2110.01052). Conformal risk control wants X_i(t) to grow with t: X_i(t) is replaced
by its maximum over all smaller t that were tested, which can only raise the bound.

A bound says nothing about prompts of another kind, nor about what lies above the cap: both belong beside the number.
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
"""From drifts [n] and their cap to an upper bound on their mean."""
SCALINGS = tuple(step / 20 for step in range(1, 21))
"""t that are tested."""

BETS = (0.25, 0.5, 0.9)
"""Shares of the capital that a drift at the cap loses; any from 0 to below 1 are valid. Large ones are tight where
drifts are far below the cap, small ones where there are thousands of prompts."""
BISECTIONS = 50


@dataclass(frozen=True)
class Certified:
    """t: scaling of the gates. bound: on E min(X(t), cap), nats per token; 0 at t = 0. mean: of the n clipped drifts.
    clipped: share of the n prompts at the cap."""

    t: float = 0.0
    bound: float = 0.0
    mean: float = 0.0
    clipped: float = 0.0


def certify(
    drifts: Callable[[float], ArrayLike],
    path: Iterable[float],
    budget: float,
    cap: float,
    bound: Bound,
) -> Certified:
    """The last t of the growing `path` before the first whose bound is above the budget; 0 where the first already is.

    drifts: t to the drifts of the same n prompts in the same order. bound: of n drifts and the cap, `conformal_bound`
    or `betting_bound` at a level. No t beyond the first failure is measured. Raises NumericalError for a NaN.
    """
    passed = Certified()
    largest: NDArray[np.float64] | float = 0.0
    for t in path:
        largest = np.maximum(largest, _clip(drifts(t), cap))
        upper = bound(largest, cap)
        if upper > budget:
            break
        passed = Certified(t, upper, float(largest.mean()), float((largest >= cap).mean()))
    return passed


def bound_of(kind: Kind, level: float) -> Bound:
    """The bound of a kind; `level` is of confidence alone."""
    return conformal_bound if kind == "expectation" else partial(betting_bound, level=level)


def conformal_bound(drifts: ArrayLike, cap: float) -> float:
    """n/(n+1)·mean + c/(n+1) of n drifts [n] clipped at the cap; at least c/(n+1)."""
    clipped = _clip(drifts, cap)
    return float(clipped.sum() + cap) / (len(clipped) + 1)


def betting_bound(drifts: ArrayLike, cap: float, level: float) -> float:
    """Upper bound on the mean of n independent drifts [n] clipped at the cap, right with probability `level` = 1 − δ.

    The capital grows with m, so that the refused means are an interval; its end, found by bisection, is the bound.
    """
    x = _clip(drifts, cap) / cap
    bets, wanted = np.array(BETS)[:, None], math.log(len(BETS)) - math.log1p(-level)

    def refused(m: float) -> bool:
        return float(np.logaddexp.reduce(np.log1p(-bets * (x - m) / (1 - m)).sum(axis=1))) >= wanted

    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if refused(middle) else (middle, high)
    return high * cap


def _clip(drifts: ArrayLike, cap: float) -> NDArray[np.float64]:
    """Drifts [n] from 0 (a KL of −1e-9 is rounding) to the cap."""
    x = np.asarray(drifts, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0 or np.isnan(x).any():
        raise NumericalError(f"drifts of shape {x.shape} with {int(np.isnan(x).sum())} NaN: need one number per prompt")
    return x.clip(0, cap)
