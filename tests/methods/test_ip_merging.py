"""IP-Merging against numpy's SVD, and what happens at the ends of its options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fake_merge import Fake, models, run
from pydantic import TypeAdapter

from vlmgraft.errors import AlignmentError, RecipeError
from vlmgraft.methods.ip_merging import IpMerging


def naive_update(own: np.ndarray, donor: np.ndarray, threshold: float, k: int) -> np.ndarray:
    U, _, Vh = np.linalg.svd(own, full_matrices=False)
    theirs = np.linalg.svd(donor, full_matrices=False)[2]
    if max(abs(Vh[i] @ theirs[i]) for i in range(min(k, len(Vh)))) < threshold:
        return np.zeros_like(own)
    donor = donor * np.linalg.norm(own) / np.linalg.norm(donor)
    return U[:, :k] @ U[:, :k].T @ donor @ Vh[:k].T @ Vh[:k]


def naive(fake: Fake, threshold: float, k: int, scale: float) -> tuple[dict[str, torch.Tensor], int]:
    merged, moved = {}, 0
    for name, own in fake.tau("vlm").items():
        stack = [one.double().numpy().reshape(-1, *own.shape[-2:]) for one in (own, fake.tau()[name])]
        updates = [naive_update(a, b, threshold, k) for a, b in zip(*stack, strict=True)]
        moved += sum(bool(update.any()) for update in updates)
        merged[name] = fake.models["vlm"][name] + scale * torch.from_numpy(np.stack(updates)).float().view(own.shape)
    return merged, moved


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.6])
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_the_formula(threshold: float, rank: int) -> None:
    fake = Fake(models(3))
    expected, _ = naive(fake, threshold, rank, 0.7)
    for name, merged in run(IpMerging(threshold, rank, 0.7), fake).items():
        torch.testing.assert_close(merged, expected[name], atol=2e-5, rtol=1e-5)


def test_the_threshold_selects() -> None:
    """The example above is not one where a threshold does nothing: more of it moves fewer of the six matrices."""
    moved = [naive(Fake(models(3)), threshold, 3, 1.0)[1] for threshold in (0.0, 0.6, 1.0)]
    assert moved[0] == 6 > moved[1] > moved[2] == 0


def test_identities() -> None:
    """λ = 0, T = 1 and a donor that is its base leave the VLM; a square matrix's full rank projects nothing away."""
    found = models()
    fake, still = Fake(found), Fake({**found, "donor": found["donor_base"]})
    for method, models_ in ((IpMerging(scale=0.0), fake), (IpMerging(1.0), fake), (IpMerging(0.0), still)):
        assert all(merged.equal(found["vlm"][name]) for name, merged in run(method, models_).items())
    square = Fake(models(shapes={"model.layers.0.self_attn.q_proj.weight": (8, 8)}))
    for name, merged in run(IpMerging(0.0, 8), square).items():
        own, tau = square.tau("vlm")[name], square.tau()[name]
        torch.testing.assert_close(
            merged, square.models["vlm"][name] + tau * own.norm() / tau.norm(), atol=1e-5, rtol=1e-5
        )


def test_a_donor_that_moved_as_the_vlm_did_is_added_whole() -> None:
    """Similarity is one, and what lies in the VLM's directions is not projected away."""
    found = models(shapes={"model.layers.0.mlp.up_proj.weight": (6, 5)})
    found["donor"] = {n: found["donor_base"][n] + 2 * (found["vlm"][n] - found["vlm_base"][n]) for n in found["vlm"]}
    fake = Fake(found)
    for name, merged in run(IpMerging(0.99, 5), fake).items():
        torch.testing.assert_close(merged, found["vlm"][name] + fake.tau("vlm")[name], atol=1e-5, rtol=1e-5)


def test_vectors_are_refused() -> None:
    with pytest.raises(AlignmentError, match="is not a matrix"):
        run(IpMerging(), Fake(models(shapes={"model.layers.0.input_layernorm.weight": (7,)})))


@pytest.mark.parametrize("options", [{"threshold": 1.5}, {"rank": 0}, {"threshold": {"mlp": -1.0}}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        IpMerging(**options)


def test_the_recipe_validates() -> None:
    found = TypeAdapter(IpMerging).validate_python({"threshold": {"mlp": 0.2, "attention": 0.5}, "rank": 64})
    assert found.rank == 64 and found.scale == 1.0
