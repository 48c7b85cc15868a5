"""Which tensors have singular directions, and how many are kept: all, a number, or enough for a share of the energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from vlmgraft.errors import AlignmentError, RecipeError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Rank = int | Literal["full"] | Mapping[str, float]


def check_rank(rank: object, option: str = "rank") -> None:
    """Raise RecipeError unless rank is "full", a positive integer or {"energy": share in (0, 1]}."""
    if rank == "full" or (isinstance(rank, int) and not isinstance(rank, bool) and rank > 0):
        return
    if isinstance(rank, Mapping) and set(rank) == {"energy"} and 0 < rank["energy"] <= 1:
        return
    raise RecipeError(f'{option}: {rank!r} is not "full", a positive integer or {{energy: share in (0, 1]}}')


def rank_for_energy(s: Float[Tensor, " r"], share: float) -> int:
    """Smallest k ≥ 1 with Σ_{i≤k} s² ≥ share · Σ s²; all directions if share is 1."""
    if share >= 1:
        return len(s)
    cumulative = s.double().square().cumsum(0)
    return min(len(s), int((cumulative < share * cumulative[-1]).sum()) + 1)


def directions_kept(s: Float[Tensor, "*experts r"], rank: Rank) -> int:
    """How many of these directions `rank` keeps; for fused experts, as many as the expert that needs most."""
    if rank == "full":
        return s.shape[-1]
    if isinstance(rank, int):
        return min(rank, s.shape[-1])
    return max(rank_for_energy(row, rank["energy"]) for row in s.reshape(-1, s.shape[-1]))


def check_matrix(name: str, shape: Sequence[int]) -> None:
    """Refuse tensors without singular directions: all but matrices [out, in] and stacks of them [experts, out, in]."""
    if len(shape) not in (2, 3) or 0 in shape:
        raise AlignmentError(
            f"{name}: shape {tuple(shape)} is not a matrix and has no singular directions; leave it out of `modules`"
        )
