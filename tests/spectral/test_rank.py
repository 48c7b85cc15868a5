"""How many directions a rank keeps, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmgraft.errors import AlignmentError, RecipeError
from vlmgraft.spectral.rank import check_matrix, check_rank, directions_kept, rank_for_energy

S = torch.tensor([3.0, 2.0, 1.0])
"""Of energy 9 + 4 + 1 = 14."""


@pytest.mark.parametrize(
    ("share", "count"), [(9 / 14, 1), (9 / 14 + 1e-6, 2), (13 / 14, 2), (13 / 14 + 1e-6, 3), (1.0, 3)]
)
def test_the_smallest_number_that_holds_the_share(share: float, count: int) -> None:
    assert rank_for_energy(S, share) == count


def test_a_zero_spectrum_keeps_one_direction_at_least_and_no_more_than_it_has() -> None:
    assert rank_for_energy(torch.zeros(4), 0.5) == 1
    assert rank_for_energy(torch.tensor([2.0, 1.0, 0.0]), 1.0) == 3


def test_a_rank_is_all_a_number_or_a_share_and_of_experts_the_neediest() -> None:
    flat = torch.tensor([1.0, 1.0, 1.0])
    assert [directions_kept(S, rank) for rank in ("full", 2, 9, {"energy": 0.9})] == [3, 2, 3, 2]
    assert directions_kept(torch.stack([S, flat]), {"energy": 0.9}) == 3
    assert directions_kept(torch.stack([S, flat]), 2) == 2


@pytest.mark.parametrize("rank", [0, -1, True, "half", {"energy": 0.0}, {"energy": 1.5}, {"share": 0.5}, {}])
def test_anything_else_is_refused_under_its_option(rank: Any) -> None:
    with pytest.raises(RecipeError, match=r"method\.rank: .* is not"):
        check_rank(rank, "method.rank")


@pytest.mark.parametrize("rank", ["full", 1, {"energy": 1.0}, {"energy": 1e-9}])
def test_what_is_a_rank_passes(rank: Any) -> None:
    check_rank(rank)


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (3, 4, 0), (2, 3, 4, 5)])
def test_only_matrices_and_stacks_with_entries_have_singular_directions(shape: tuple[int, ...]) -> None:
    check_matrix("w", (1, 1))
    check_matrix("w", (2, 3, 4))
    with pytest.raises(AlignmentError, match=r"^w: shape \(.*\) is not a matrix"):
        check_matrix("w", shape)
