"""SCE entry by entry in float64, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fake_merge import SHAPES, Fake, models, run

from vlmgraft.errors import RecipeError
from vlmgraft.methods.sce import Sce


def naive(vlm: np.ndarray, donor: np.ndarray, density: float) -> np.ndarray:
    """mergekit's rule, where no two variances are equal and no two entries cancel."""
    taus = np.stack([vlm, donor])
    if density < 1:
        variance = taus.var(axis=0)
        count = int(density * np.count_nonzero(variance))
        taus = taus * (variance >= np.sort(variance, axis=None)[::-1][count - 1])
    weights = (taus**2).reshape(2, -1).mean(1)
    weights = (weights / weights.sum()).reshape(2, *[1] * vlm.ndim)
    agree = (np.sign(taus) == np.sign(taus.sum(0))) * weights
    return (taus * agree).sum(0) / np.maximum(agree.sum(0), 1e-6)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_it_is_the_rule_on_every_matrix_and_every_expert(density: float) -> None:
    fake = Fake(models(low=False, shapes={**SHAPES, "model.norm.weight": (11,)}))
    merged = run(Sce(density, 0.7), fake)
    for name, base in fake.models["vlm_base"].items():
        pair = [fake.tau(key)[name].double().numpy() for key in ("vlm", "donor")]
        stacks = [tau if tau.ndim == 3 else tau[None] for tau in pair]
        update = np.stack([naive(vlm, donor, density) for vlm, donor in zip(*stacks, strict=True)])
        expected = base.double() + 0.7 * torch.from_numpy(update).reshape(base.shape)
        torch.testing.assert_close(merged[name], expected.float())


def test_by_hand() -> None:
    """τ₁ = (3, 1, 0, 2), τ₂ = (1, −4, 0, 2): energies 14 and 21; the second entry elects the donor's sign."""
    zero = torch.zeros(4)
    vlm, donor = torch.tensor([3.0, 1, 0, 2]), torch.tensor([1.0, -4, 0, 2])
    tensors = {"vlm": vlm, "donor": donor, "vlm_base": zero, "donor_base": zero}
    name = "model.layers.0.mlp.up_proj.weight"
    context = Fake({key: {name: one} for key, one in tensors.items()}).context(name)
    merged = Sce().apply(tensors, context).tolist()
    assert merged == pytest.approx([3 * 0.4 + 1 * 0.6, -4, 0, 2])
    # half of the two entries whose variance is not zero: the second alone, where the donor wins
    assert Sce(0.5).apply(tensors, context).tolist() == pytest.approx([0, -4, 0, 0])
    assert Sce(0.3).apply(tensors, context).tolist() == [0, 0, 0, 0]


def test_identities() -> None:
    """Without the donor's task vector: the VLM; at scale zero: its base; two equal models: that model."""
    tensors = models()
    for name, merged in run(Sce(), Fake({**tensors, "donor": tensors["donor_base"]})).items():
        torch.testing.assert_close(merged, tensors["vlm"][name], atol=1e-6, rtol=0)
    for name, merged in run(Sce(scale=0.0), Fake(tensors)).items():
        assert merged.equal(tensors["vlm_base"][name])
    twins = {**tensors, "donor": tensors["vlm"], "donor_base": tensors["vlm_base"]}
    for name, merged in run(Sce(), Fake(twins)).items():
        torch.testing.assert_close(merged, tensors["vlm"][name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.5}, {"scale": float("nan")}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        Sce(**options)
