"""Control of the injection weight α so that the measured drift ends at a budget of ε nats per token.

The drift is driven to ε by dual ascent on log α: an integral part that adds 0.2·e per step, e = clip(log(ε/KL), ±1),
and a proportional part 2·e on the current error (integral control alone overshoots by a quarter to a third). The
integral is clamped, or a budget that cannot be reached would wind it up. What is off after the last step is taken away
by `largest_within`: all logits are moved by one constant until the measured drift is just within ε.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

INTEGRAL_GAIN = 0.2
PROPORTIONAL_GAIN = 2.0
ERROR_LIMIT = 1.0
WINDUP_LIMIT = math.log(1e3)
TOLERANCE = 0.03
"""A drift between 97 % of the budget and the budget itself is as good as the budget."""
MEASUREMENTS = 20


def largest_within(measure: Callable[[float], float], budget: float, low: float, high: float) -> tuple[float, float]:
    """The largest x from `low` to `high` whose drift `measure(x)`, growing with x, is within the budget; and the drift.

    To a tolerance of 3 % of the budget, by secants on log drift that start at 0 and stay in the bracket: three or four
    measurements where the drift is nearly right. A drift that is not finite is too large. Gives `low` where even that
    is too far.
    """
    inside, outside, x = low, high, 0.0
    best: tuple[float, float] | None = None
    before: tuple[float, float] | None = None
    exceeded = False
    for _ in range(MEASUREMENTS):
        kl = measure(x)
        error = math.log(max(kl, 1e-30) / budget) if math.isfinite(kl) else math.inf
        if error <= 0:
            inside, best = x, (x, kl)
        else:
            outside, exceeded = x, True
        if -TOLERANCE <= error <= 0 or x == (high if error <= 0 else low):
            break
        slope = (error - before[1]) / (x - before[0]) if before else 1.0
        guess = x - (error + TOLERANCE / 2) / slope if 0 < slope < math.inf else math.nan
        before = (x, error)
        if inside < guess < outside:
            x = guess
        elif best is None:
            x = low
        else:
            x = (inside + outside) / 2 if exceeded else high
    return best or (low, kl)


@dataclass
class FixedWeight:
    """α as the recipe gave it."""

    weight: float
    budget: float | None = None

    def step(self) -> None:
        """Nothing changes."""

    def state(self) -> dict[str, float]:
        """Nothing to keep."""
        return {}


@dataclass
class BudgetControl:
    """α that follows the drift. `observe` takes a measurement, `step` advances the integral by one training step."""

    budget: float
    start: float
    integral: float = 0.0
    error: float = 0.0

    def observe(self, kl: float) -> None:
        """A new measurement of the drift, in nats per token."""
        self.error = max(-ERROR_LIMIT, min(ERROR_LIMIT, math.log(self.budget / max(kl, 1e-12))))

    def step(self) -> None:
        """One training step under the last measured error."""
        moved = self.integral + INTEGRAL_GAIN * self.error
        self.integral = max(-WINDUP_LIMIT, min(WINDUP_LIMIT, moved))

    @property
    def weight(self) -> float:
        """The current α."""
        return self.start * math.exp(self.integral + PROPORTIONAL_GAIN * self.error)

    def state(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"integral": self.integral, "error": self.error}
