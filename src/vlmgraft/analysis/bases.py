"""Which of several models the donor was tuned from: the one that leaves the shortest task vector.

DeepSeek-R1-Distill-Qwen-7B, for one, was tuned from Qwen2.5-Math-7B, not from Qwen2.5-7B, from which Qwen2.5-VL
descends; a task vector from the wrong base holds the difference of the two bases as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vlmgraft.alignment.align import Alignment
from vlmgraft.alignment.distance import Distance, measure_distances

CLEAR = 1.5
"""A base is called the donor's when the next one leaves a task vector this many times as long; our choice."""


@dataclass(frozen=True)
class Candidate:
    """One possible base: ‖τ‖ and ‖τ_vlm‖ over all merged tensors with it, relative to ‖W_vlm‖."""

    base: str
    donor_ratio: float
    vlm_ratio: float
    rows: tuple[Distance, ...]


def compare_bases(
    alignments: Mapping[str, Alignment], progress: Callable[[int, int, str], None] | None = None
) -> tuple[Candidate, ...]:
    """Candidates by name of the base, the one nearest to the donor first. Raises AlignmentError."""
    found = []
    for base, alignment in alignments.items():
        rows = measure_distances(alignment, progress)
        weight = math.hypot(*(row.weight_norm for row in rows))
        donor, vlm = (math.hypot(*(getattr(row, f"{who}_norm") for row in rows)) for who in ("donor", "vlm"))
        found.append(Candidate(base, donor / weight, vlm / weight, rows))
    return tuple(sorted(found, key=lambda one: one.donor_ratio))


def name_base(candidates: Sequence[Candidate]) -> str:
    """Which base explains the donor best, in words; `candidates` as `compare_bases` orders them."""
    best, *others = candidates
    if not others:
        return f"from {best.base}, the only base given, ‖τ‖ is {best.donor_ratio:.3f} of ‖W‖"
    if best.donor_ratio == 0:
        return f"{best.base} holds the donor's very weights; it is not its base"
    times = others[0].donor_ratio / best.donor_ratio
    said = f"{others[0].base} leaves a task vector {times:.1f} times as long as {best.base}"
    if times >= CLEAR:
        return f"the donor was tuned from {best.base}: {said}"
    return f"{best.base} is nearest, but not clearly: {said}; ask the donor's model card"
