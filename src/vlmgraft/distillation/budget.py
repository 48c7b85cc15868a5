"""Control of the injection weight α so that the measured KL divergence ends at a budget of ε nats per token.

log α follows a proportional-integral controller with the error e = clip(log(ε/KL), ±1): the integral grows by 0.2·e per
training step (dual ascent), the proportional part is 2·e (integral control alone overshoots by a quarter to a third).
The integral is clamped, so that it does not wind up when the budget cannot be reached. Each measurement takes another
part of the held-out prompts (`Rotation`). After the last step `largest_within` removes the remaining error, measured on
all held-out prompts: all logits are shifted by one constant until the KL is just within ε.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

INTEGRAL_GAIN = 0.2
PROPORTIONAL_GAIN = 2.0
ERROR_LIMIT = 1.0
WINDUP_LIMIT = math.log(1e3)
TOLERANCE = 0.03
"""A KL divergence between 97 % of the budget and the budget itself counts as the budget."""
KL_FLOOR = 1e-30
"""A measured KL below this, in nats, is raised to it before its logarithm is taken."""
MEASUREMENTS = 20
DIFFICULTY_LIMIT = 4.0
"""Largest factor, up or down, by which the KL on a part is corrected."""


def largest_within(measure: Callable[[float], float], budget: float, low: float, high: float) -> tuple[float, float]:
    """The largest x in [low, high] with measure(x) ≤ budget, and its KL; `measure` increases with x.

    Secant steps on the logarithm of the KL start at x = 0, stay inside the bracket and end within `TOLERANCE`: three or
    four measurements if x = 0 is nearly right, and at most `MEASUREMENTS`. A KL that is not finite counts as too large.
    Returns `low` and its KL if every measurement exceeds the budget.
    """
    inside, outside, x = low, high, 0.0
    best: tuple[float, float] | None = None
    previous: tuple[float, float] | None = None
    exceeded = False
    for _ in range(MEASUREMENTS):
        kl = measure(x)
        error = math.log(max(kl, KL_FLOOR) / budget) if math.isfinite(kl) else math.inf
        if error <= 0:
            inside, best = x, (x, kl)
        else:
            outside, exceeded = x, True
        if -TOLERANCE <= error <= 0 or x == (high if error <= 0 else low):
            break
        slope = (error - previous[1]) / (x - previous[0]) if previous else 1.0
        guess = x - (error + TOLERANCE / 2) / slope if 0 < slope < math.inf else math.nan
        previous = (x, error)
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

    def step(self) -> None:
        """Do nothing: α is fixed."""

    def state(self) -> dict[str, float]:
        """Empty: there is nothing to save."""
        return {}


@dataclass
class BudgetControl:
    """α under proportional-integral control. `observe` takes a measurement, `step` advances the integral."""

    budget: float
    start: float
    integral: float = 0.0
    error: float = 0.0

    def observe(self, kl: float) -> None:
        """A new measurement of the KL divergence, in nats per token."""
        self.error = max(-ERROR_LIMIT, min(ERROR_LIMIT, math.log(self.budget / max(kl, KL_FLOOR))))

    def step(self) -> None:
        """One training step under the last measured error."""
        integral = self.integral + INTEGRAL_GAIN * self.error
        self.integral = max(-WINDUP_LIMIT, min(WINDUP_LIMIT, integral))

    @property
    def weight(self) -> float:
        """The current α."""
        return self.start * math.exp(self.integral + PROPORTIONAL_GAIN * self.error)

    def state(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"integral": self.integral, "error": self.error}


@dataclass
class Rotation:
    """Estimate of the KL on all held-out prompts from one part of them at a time.

    Prompts differ in difficulty by more than a few training steps change their KL. The first observation therefore
    measures every part; later ones measure one part and scale it by the ratio of the whole to that part at the first
    observation (a ratio estimate).

    tokens: number of tokens in each part. first: KL of every part at the first observation. turn: observations so far.
    """

    tokens: Sequence[int]
    first: list[float] = field(default_factory=list)
    turn: int = 0

    def observe(self, measure: Callable[[int], float]) -> float:
        """The estimated KL on all prompts, in nats per token; `measure` returns the KL on a part, given its index."""
        parts, self.turn = len(self.tokens), self.turn + 1
        if not self.first:
            self.first = [measure(part) for part in range(parts)]
            return self._whole()
        part = (self.turn - 2) % parts
        difficulty = self._whole() / max(self.first[part], KL_FLOOR)
        return measure(part) * min(max(difficulty, 1 / DIFFICULTY_LIMIT), DIFFICULTY_LIMIT)

    def _whole(self) -> float:
        return sum(kl * count for kl, count in zip(self.first, self.tokens, strict=True)) / sum(self.tokens)

    def state(self) -> dict[str, list[float] | int]:
        """What a resumed run needs."""
        return {"first": self.first, "turn": self.turn}
