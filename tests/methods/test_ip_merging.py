"""IP-Merging against numpy's SVD, and what happens at the ends of its options."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fake_merge import Fake, models, run
from pydantic import TypeAdapter

from vlmgraft.errors import AlignmentError, RecipeError
from vlmgraft.methods.ip_merging import IpMerging


def released_update(own: np.ndarray, donor: np.ndarray, threshold: float, k: int) -> np.ndarray:
    U, s, Vh = np.linalg.svd(own, full_matrices=False)
    donor_U, donor_s, donor_Vh = np.linalg.svd(donor, full_matrices=False)
    k = min(k, len(s))
    cosines = np.array([Vh[i] @ donor_Vh[i] * np.sign(U[:, i] @ donor_U[:, i]) for i in range(k)])
    if cosines.max() < threshold:
        return np.zeros_like(own)
    weighted = (np.exp(32 * cosines) / np.exp(32 * cosines).sum())[:, None] * Vh[:k]
    low_rank = donor_U[:, :k] @ np.diag(donor_s[:k]) @ donor_Vh[:k]
    return s[:k].sum() / donor_s[:k].sum() * low_rank @ weighted.T @ weighted


def paper_update(own: np.ndarray, donor: np.ndarray, threshold: float, k: int) -> np.ndarray:
    U, _, Vh = np.linalg.svd(own, full_matrices=False)
    theirs = np.linalg.svd(donor, full_matrices=False)[2]
    if max(abs(Vh[i] @ theirs[i]) for i in range(min(k, len(Vh)))) < threshold:
        return np.zeros_like(own)
    donor = donor * np.linalg.norm(own) / np.linalg.norm(donor)
    return U[:, :k] @ U[:, :k].T @ donor @ Vh[:k].T @ Vh[:k]


TWINS: dict[Any, Callable[..., np.ndarray]] = {"released": released_update, "paper": paper_update}


def naive(fake: Fake, threshold: float, k: int, scale: float, variant: str) -> tuple[dict[str, torch.Tensor], int]:
    merged, moved = {}, 0
    for name, own in fake.tau("vlm").items():
        stack = [one.double().numpy().reshape(-1, *own.shape[-2:]) for one in (own, fake.tau()[name])]
        updates = [TWINS[variant](a, b, threshold, k) for a, b in zip(*stack, strict=True)]
        moved += sum(bool(update.any()) for update in updates)
        merged[name] = fake.models["vlm"][name] + scale * torch.from_numpy(np.stack(updates)).float().view(own.shape)
    return merged, moved


@pytest.mark.parametrize("variant", TWINS)
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.6])
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_the_formula(threshold: float, rank: int, variant: Any) -> None:
    fake = Fake(models(3))
    expected, _ = naive(fake, threshold, rank, 0.7, variant)
    for name, merged in run(IpMerging(threshold, rank, 0.7, variant), fake).items():
        torch.testing.assert_close(merged, expected[name], atol=2e-5, rtol=1e-5)


def hand_chosen(turn: float) -> Fake:
    """τ_vlm = diag(3, 1); τ = diag(4, 1) with its input side turned by an angle (radians), its output side not."""
    rotation = torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    name, zero = "model.layers.0.self_attn.q_proj.weight", torch.zeros(2, 2)
    tensors = {
        "vlm_base": zero,
        "vlm": torch.diag(torch.tensor([3.0, 1.0])),
        "donor_base": zero,
        "donor": torch.diag(torch.tensor([4.0, 1.0])) @ rotation,
    }
    return Fake({key: {name: tensor} for key, tensor in tensors.items()})


def test_the_released_script_by_hand() -> None:
    """Both cosines are cos 60° = ½, so p = ½, ½ and Σ p² v vᵀ = I/4; nuclear norms 4 and 5: ΔW = 4/5 · τ/4."""
    [merged] = run(IpMerging(), hand_chosen(math.pi / 3)).values()
    root = math.sqrt(3) / 2
    expected = torch.tensor([[3 + 0.2 * 4 * 0.5, 0.2 * 4 * root], [-0.2 * root, 1 + 0.2 * 0.5]])
    torch.testing.assert_close(merged, expected, atol=1e-6, rtol=1e-6)


def test_the_paper_by_hand() -> None:
    """Rank 1 keeps entry (0, 0), τ's is 4·½; Frobenius norms √10 and √17: ΔW₀₀ = 2·√(10/17)."""
    [merged] = run(IpMerging(rank=1, variant="paper"), hand_chosen(math.pi / 3)).values()
    expected = torch.tensor([[3 + 2 * math.sqrt(10 / 17), 0.0], [0.0, 1.0]])
    torch.testing.assert_close(merged, expected, atol=1e-6, rtol=1e-6)


def test_a_donor_that_moved_the_other_way_is_not_alike() -> None:
    """Turned by 120°, both cosines are −½: the script leaves the VLM, the paper's |cos| does not."""
    fake = hand_chosen(2 * math.pi / 3)
    assert run(IpMerging(), fake).popitem()[1].equal(torch.diag(torch.tensor([3.0, 1.0])))
    assert not run(IpMerging(variant="paper"), fake).popitem()[1].equal(torch.diag(torch.tensor([3.0, 1.0])))


@pytest.mark.parametrize(("variant", "thresholds"), [("released", (0.0, 0.2, 0.4)), ("paper", (0.0, 0.6, 1.0))])
def test_the_threshold_selects(variant: str, thresholds: tuple[float, ...]) -> None:
    """The example above is not one where a threshold does nothing: more of it moves fewer of the six matrices."""
    moved = [naive(Fake(models(3)), threshold, 3, 1.0, variant)[1] for threshold in thresholds]
    assert 6 >= moved[0] > moved[1] > moved[2] == 0


def test_identities() -> None:
    """λ = 0, T = 1 and a donor that is its base leave the VLM; a square matrix's full rank projects nothing away."""
    found = models()
    fake, still = Fake(found), Fake({**found, "donor": found["donor_base"]})
    for method, models_ in ((IpMerging(scale=0.0), fake), (IpMerging(1.0), fake), (IpMerging(0.0), still)):
        assert all(merged.equal(found["vlm"][name]) for name, merged in run(method, models_).items())
    square = Fake(models(shapes={"model.layers.0.self_attn.q_proj.weight": (8, 8)}))
    for name, merged in run(IpMerging(0.0, 8, variant="paper"), square).items():
        own, tau = square.tau("vlm")[name], square.tau()[name]
        torch.testing.assert_close(
            merged, square.models["vlm"][name] + tau * own.norm() / tau.norm(), atol=1e-5, rtol=1e-5
        )


def test_a_donor_that_moved_as_the_vlm_did_is_added_whole() -> None:
    """Similarity is one, and what lies in the VLM's directions is not projected away."""
    found = models(shapes={"model.layers.0.mlp.up_proj.weight": (6, 5)})
    found["donor"] = {n: found["donor_base"][n] + 2 * (found["vlm"][n] - found["vlm_base"][n]) for n in found["vlm"]}
    fake = Fake(found)
    for name, merged in run(IpMerging(0.99, 5, variant="paper"), fake).items():
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
    assert found.rank == 64 and found.variant == "released"
