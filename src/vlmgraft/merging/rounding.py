"""How much of a merge survives the cast to the file's dtype, and a cast that preserves it on average.

bfloat16 has 8 significant bits: rounding to nearest loses a change smaller than half a step of a weight, so that a
merge with a small λ may leave most entries unchanged. With d = merged − VLM in float32 and w = written − VLM,

    effective λ = ⟨w, d⟩/‖d‖²      noise = ‖w − effective·d‖/‖d‖      changed = share of entries with w ≠ 0

An effective λ of 1 means that the file holds the intended change (as a factor on it), 0 that it holds nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmgraft.methods.base import TensorContext
from vlmgraft.methods.draws import draws

LEAST_EFFECTIVE = 0.9
"""The receipt warns below this effective λ."""


@dataclass(frozen=True)
class ChunkFacts:
    """Facts of a chunk. task_vector: ‖donor − base‖². added: ‖d‖². error: ‖w − d‖². along: ⟨w − d, d⟩. changed: count.

    clamped: values beyond the dtype, set to its largest value. nonfinite: NaN and infinite values of a copied chunk.
    weight: ‖VLM‖².
    """

    task_vector: float = 0.0
    added: float = 0.0
    error: float = 0.0
    along: float = 0.0
    changed: int = 0
    clamped: int = 0
    nonfinite: int = 0
    weight: float = 0.0


@dataclass(frozen=True)
class Survival:
    """The figures of the module's docstring; effective and noise are None if there was no change to add."""

    effective: float | None
    noise: float | None
    changed: float

    def line(self) -> str:
        """In words, for the card and the terminal."""
        if self.effective is None or self.noise is None:
            return "effective λ: nothing was to be added"
        return (
            f"effective λ {self.effective:.3f} (1: the whole change survived the rounding to the file's dtype), "
            f"noise {self.noise:.3f}, {self.changed:.1%} of the entries changed"
        )


def survival(added: float, error: float, along: float, changed: int, elements: int) -> Survival:
    """The figures from sums of `ChunkFacts` over `elements` entries; sums of w − d stay precise where it is small."""
    share = changed / max(1, elements)
    if not added > 0:
        return Survival(None, None, share)
    noise = math.sqrt(max(0.0, error - along**2 / added) / added)
    return Survival(1 + along / added, noise, share)


def survival_of(parts: Iterable[tuple[float, Survival, int]]) -> Survival:
    """The figures of several tensors together, from each tensor's ‖d‖, figures and number of entries."""
    added = error = along = changed = 0.0
    elements = 0
    for norm, part, count in parts:
        lost = (part.effective or 0.0) - 1
        added += norm**2
        along += lost * norm**2
        error += (lost**2 + (part.noise or 0.0) ** 2) * norm**2
        changed += part.changed * count
        elements += count
    return survival(added, error, along, round(changed), elements)


def inner(left: Tensor, right: Tensor) -> float:
    """⟨left, right⟩ of flat float32 tensors, in parts, because longer sums lose precision."""
    pairs = zip(left.split(1 << 16), right.split(1 << 16), strict=True)
    return math.fsum(float(torch.dot(a, b)) for a, b in pairs)


def round_stochastically(values: Tensor, out: Tensor, seed: int, context: TensorContext) -> None:
    """Round flat float32 values into `out`, up or down with the probabilities that preserve the mean.

    The probability is exact to 2⁻¹⁶ for bfloat16 and to 2⁻³² for other dtypes. The direction is a function of (seed,
    tensor name, entry) alone. Values beyond the dtype become infinite.
    """
    words = draws(seed, "rounding", context, values.numel())
    raw = values.contiguous().numpy()
    if out.dtype == torch.bfloat16:
        bits = (raw.view(np.uint32) + (words & np.uint32(0xFFFF))) & np.uint32(0xFFFF0000)
        out.copy_(torch.from_numpy(bits.view(np.float32)))
        return
    info = torch.finfo(out.dtype)
    if info.eps <= torch.finfo(torch.float32).eps:
        out.copy_(values)
        return
    exponents = np.maximum(np.frexp(raw)[1] - 1, round(math.log2(info.smallest_normal)))
    step = np.ldexp(1.0, exponents + round(math.log2(info.eps)))
    rounded = np.floor(np.abs(raw.astype(np.float64)) / step + words * 2.0**-32) * step
    out.copy_(torch.from_numpy(np.copysign(rounded, raw).astype(np.float32)))
