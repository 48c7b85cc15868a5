"""Model Stock in float64, and by hand: 60° give t = 2/3."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_merge import SHAPES, Fake, models, run

from vlmgraft.methods.model_stock import ModelStock, angle_cosine


@pytest.mark.parametrize("filter_wise", [False, True])
def test_it_is_the_formula_on_every_matrix_and_every_expert(filter_wise: bool) -> None:
    fake = Fake(models(shapes={**SHAPES, "model.norm.weight": (7,)}))
    merged = run(ModelStock(filter_wise), fake)
    for name, base in fake.models["vlm_base"].items():
        pair = [fake.tau(key)[name].double().numpy() for key in ("vlm", "donor")]
        if filter_wise:
            rows = [tau.reshape(-1, tau.shape[-1]) for tau in pair]
        else:
            rows = [tau.reshape(tau.shape[0] if tau.ndim == 3 else 1, -1) for tau in pair]
        cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*rows, strict=True)]
        t = np.array([2 * c / (1 + c) for c in cosine])[:, None]
        update = torch.from_numpy(t * (rows[0] + rows[1]) / 2).reshape(base.shape)
        torch.testing.assert_close(merged[name], (base.double() + update).float())


def merge(vlm: list[float], donor: list[float]) -> list[float]:
    zero = torch.zeros(len(vlm))
    tensors = {"vlm": torch.tensor(vlm), "donor": torch.tensor(donor), "vlm_base": zero, "donor_base": zero}
    name = "model.layers.0.mlp.up_proj.weight"
    context = Fake({key: {name: one} for key, one in tensors.items()}).context(name)
    return ModelStock().apply(tensors, context).tolist()


def test_by_hand() -> None:
    """(2, 0) and (1, √3) enclose 60°: t = 2·½/1½ = 2/3 of their mean (1½, √3/2); at a right angle t = 0."""
    assert merge([2.0, 0.0], [1.0, 3**0.5]) == pytest.approx([1.0, 3**0.5 / 3])
    assert merge([2.0, 0.0], [0.0, 5.0]) == [0, 0]
    assert merge([2.0, 0.0], [0.0, 0.0]) == [0, 0]
    assert merge([2.0, 0.0], [-1.0, 0.0]) == [0, 0]
    assert merge([2.0, 0.0], [-1.0, 3**0.5]) == pytest.approx([-1.0, -(3**0.5)])  # 120°: t = −2


def test_two_equal_models_are_that_model() -> None:
    tensors = models()
    twins = Fake({**tensors, "donor": tensors["vlm"], "donor_base": tensors["vlm_base"]})
    for name, merged in run(ModelStock(), twins).items():
        torch.testing.assert_close(merged, tensors["vlm"][name], atol=1e-6, rtol=0)


def test_small_task_vectors_keep_their_angle() -> None:
    a, b = torch.tensor([1e-12, 0.0]), torch.tensor([1e-12, 1e-12])
    assert float(angle_cosine(a, b, rows=False)) == pytest.approx(0.5**0.5)
