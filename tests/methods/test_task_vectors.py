"""Signs that are elected and entries that agree, by hand; the matrices of a stack one by one."""

from __future__ import annotations

import torch

from vlmgraft.methods.task_vectors import merge_signs, per_matrix


def test_opposite_entries_of_one_size_elect_nothing() -> None:
    own, donor = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([-1.0, -0.5, 0.0])
    assert merge_signs(own.clone(), donor.clone(), (1.0, 1.0), "unweighted", "mean").tolist() == [0, 1, 0]
    assert merge_signs(own, donor, (1.0, 3.0), "weighted", "sum").tolist() == [-3, -1.5, 0]


def test_frequency_and_max_by_hand() -> None:
    """The first entry is in conflict; of the second and third, one model has nothing, or the larger share."""
    own, donor = torch.tensor([3.0, 0.0, -1.0]), torch.tensor([-1.0, 2.0, -4.0])
    assert merge_signs(own.clone(), donor.clone(), (1.0, 1.0), "frequency", "sum").tolist() == [0, 2, -5]
    assert merge_signs(own.clone(), donor.clone(), (1.0, 1.0), "unweighted", "max").tolist() == [3, 2, -4]
    assert merge_signs(own, donor, (8.0, 1.0), "unweighted", "max").tolist() == [24, 2, -8]


def test_the_mean_of_the_weights_and_of_their_number() -> None:
    """Entries: both agree; the donor alone; opposite, the VLM is elected. Weights 1 and 3."""
    vlm, donor = torch.tensor([2.0, 0.0, 5.0]), torch.tensor([4.0, 6.0, -1.0])
    for combine, expected in (("mean", [7, 18, 5]), ("weighted_mean", [3.5, 6, 5]), ("sum", [14, 18, 5])):
        merged = merge_signs(vlm.clone(), donor.clone(), (1.0, 3.0), "unweighted", combine)  # type: ignore[arg-type]
        assert merged.tolist() == expected
    cancelling = merge_signs(vlm.clone(), donor.clone(), (1.0, -1.0), "unweighted", "weighted_mean")
    assert cancelling.tolist() == [-2, 6, 5]  # weights that add up to zero divide nothing


def test_a_stack_is_merged_matrix_by_matrix() -> None:
    stack = torch.arange(24.0).reshape(2, 3, 4)
    starts: list[int] = []

    def negate(tensors: dict[str, torch.Tensor], start: int) -> torch.Tensor:
        starts.append(start)
        return -tensors["vlm"]

    assert per_matrix(negate, {"vlm": stack}).equal(-stack) and starts == [0, 12]  # type: ignore[arg-type]
    assert per_matrix(negate, {"vlm": stack[0]}).equal(-stack[0]) and starts[2:] == [0]  # type: ignore[arg-type]
