"""Control of the injection weight α so that the measured drift ends at a budget of ε nats per token.

The drift is driven to ε by dual ascent on log α: an integral part that adds 0.2·e per step, e = clip(log(ε/KL), ±1),
and a proportional part 2·e on the current error (integral control alone overshoots by a quarter to a third). The
integral is clamped, or a budget that cannot be reached would wind it up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

INTEGRAL_GAIN = 0.2
PROPORTIONAL_GAIN = 2.0
ERROR_LIMIT = 1.0
WINDUP_LIMIT = math.log(1e3)


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
