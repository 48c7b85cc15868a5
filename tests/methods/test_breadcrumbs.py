"""Breadcrumbs against a sort in numpy, entry by entry, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fake_merge import SHAPES, Fake, models, run

from vlmgraft.errors import RecipeError
from vlmgraft.methods.breadcrumbs import Breadcrumbs, without_extremes


def thinned(tau: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """mergekit's rule with indices of a sort, where all magnitudes differ."""
    order = np.argsort(np.abs(tau), axis=None)
    kept, top = int(density * tau.size), int(gamma * tau.size)
    top = min(top, tau.size - kept)
    mask = np.zeros(tau.size)
    mask[order[tau.size - top - kept : tau.size - top]] = 1
    return tau * mask.reshape(tau.shape)


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.95, 0.2), (0.3, 0.0), (1.0, 0.3), (0.2, 0.8)])
def test_it_is_the_rule_on_every_matrix_and_every_expert(density: float, gamma: float) -> None:
    fake = Fake(models(low=False, shapes={**SHAPES, "model.norm.weight": (7,)}))
    merged = run(Breadcrumbs(density, (1.6, 0.4), 0.7, gamma=gamma, donor_density=0.4), fake)
    for name, base in fake.models["vlm_base"].items():
        taus = (fake.tau(key)[name].double().numpy() for key in ("vlm", "donor"))
        stacks = [tau if tau.ndim == 3 else tau[None] for tau in taus]
        shares = ((density, gamma), (0.4, gamma))
        left = [
            np.stack([matrix if share[0] == 1 else thinned(matrix, *share) for matrix in stack])
            for stack, share in zip(stacks, shares, strict=True)
        ]
        update = torch.from_numpy(0.7 * (1.6 * left[0] + 0.4 * left[1])).reshape(base.shape)
        torch.testing.assert_close(merged[name], (base.double() + update).float())


def test_by_hand() -> None:
    """Of ten entries one outlier goes, the next three stay; equal magnitudes at the edge stay together."""
    tau = torch.tensor([1.0, -9, 3, -4, 5, 0.5, 0, 3, 2, -1])
    assert without_extremes(tau.clone(), 0.3, 0.1).tolist() == [0, 0, 3, -4, 5, 0, 0, 3, 0, 0]
    assert without_extremes(tau.clone(), 0.2, 0.0).tolist() == [0, -9, 0, 0, 5, 0, 0, 0, 0, 0]
    assert without_extremes(tau.clone(), 0.9, 0.5).tolist() == [1, 0, 3, -4, 5, 0.5, 0, 3, 2, -1]
    assert without_extremes(tau.clone(), 1.0, 0.5).equal(tau)


def test_with_an_election_only_the_elected_signs_are_added() -> None:
    fake = Fake(models())
    merged = run(Breadcrumbs(1.0, (1.0, 0.5), election="weighted", combine="sum"), fake)
    for name, base in fake.models["vlm_base"].items():
        vlm, donor = fake.tau("vlm")[name], 0.5 * fake.tau("donor")[name]
        elected = torch.where((vlm > 0) == (vlm + donor > 0), vlm, 0) + torch.where(
            (donor > 0) == (vlm + donor > 0), donor, 0
        )
        torch.testing.assert_close(merged[name], base + torch.where(vlm + donor == 0, 0, elected))


def test_identities() -> None:
    """Without the donor's task vector and nothing dropped: the VLM; at scale zero: its base."""
    tensors = models()
    for name, merged in run(Breadcrumbs(1.0), Fake({**tensors, "donor": tensors["donor_base"]})).items():
        torch.testing.assert_close(merged, tensors["vlm"][name], atol=1e-6, rtol=0)
    for name, merged in run(Breadcrumbs(scale=0.0), Fake(tensors)).items():
        assert merged.equal(tensors["vlm_base"][name])


@pytest.mark.parametrize("options", [{"gamma": 1.5}, {"gamma": -0.1}, {"density": 0.0}, {"donor_density": 2.0}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        Breadcrumbs(**options)
