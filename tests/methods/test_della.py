"""DELLA: the probabilities by hand, the shares that stay, what rescaling keeps, and DARE at ε = 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_merge import SHAPES, Fake, models, run

from vlmgraft.errors import RecipeError
from vlmgraft.methods.dare import DareLinear
from vlmgraft.methods.della import Della, keep_probabilities


def test_probabilities_rise_with_the_rank_in_a_row() -> None:
    tau = torch.tensor([[0.1, -5.0, 2.0], [3.0, -3.0, 0.0]])
    expected = torch.tensor([[0.4, 0.6, 0.5], [0.5, 0.6, 0.4]])
    torch.testing.assert_close(keep_probabilities(tau, 0.5, 0.1), expected)
    torch.testing.assert_close(keep_probabilities(tau[0], 0.5, 0.1), expected[0])


def test_entries_stay_as_often_as_their_probability_says() -> None:
    context = Fake(models()).context("model.layers.0.mlp.up_proj.weight")
    tau = torch.arange(1.0, 5.0).expand(40_000, 4).contiguous()
    kept = Della(0.5, epsilon=0.3, rescale="none").thinned(tau, "donor", context)
    shares = (kept != 0).double().mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.4, 0.6, 0.8]).double(), atol=0.01, rtol=0)
    by_probability = Della(0.5, epsilon=0.3).thinned(tau, "donor", context)
    torch.testing.assert_close(by_probability.mean(0), tau[0], atol=0.1, rtol=0)
    assert by_probability[by_probability[:, 0] != 0, 0].unique().tolist() == pytest.approx([5.0])
    l1 = Della(0.5, epsilon=0.3, rescale="l1").thinned(tau, "donor", context)
    assert float(l1.abs().sum(dtype=torch.float64)) == pytest.approx(float(tau.sum(dtype=torch.float64)), rel=1e-5)
    torch.testing.assert_close(l1 / l1.max() * 4, kept)


def test_without_epsilon_it_is_dare() -> None:
    """The same entries of every tensor and every expert, divided by the density."""
    fake = Fake(models(shapes={**SHAPES, "model.norm.weight": (7,)}), chunk=10**6)
    options: dict[str, Any] = {"density": 0.4, "weights": (1.6, 0.4), "scale": 0.7, "seed": 5, "donor_density": 0.6}
    dare, della = run(DareLinear(**options), fake), run(Della(**options, epsilon=0.0, election="none"), fake)
    for name in fake.names:
        torch.testing.assert_close(della[name], dare[name])


def test_identities() -> None:
    tensors = models()
    for name, merged in run(Della(1.0), Fake({**tensors, "donor": tensors["donor_base"]})).items():
        torch.testing.assert_close(merged, tensors["vlm"][name], atol=1e-6, rtol=0)
    for name, merged in run(Della(scale=0.0), Fake(tensors)).items():
        assert merged.equal(tensors["vlm_base"][name])
    once, again = run(Della(), Fake(tensors)), run(Della(), Fake(tensors))
    assert all(once[name].equal(again[name]) for name in once)


@pytest.mark.parametrize("options", [{"epsilon": 0.6}, {"epsilon": -0.1}, {"density": 0.0}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        Della(**options)


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_probabilities_outside_0_to_1_are_refused(density: float) -> None:
    with pytest.raises(RecipeError, match=f"0.15 around a density of {density}"):
        run(Della(density), Fake(models()))
