"""Spectral rules against numpy's SVD of whole matrices, and what they keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fake_merge import Fake, models, run
from pydantic import TypeAdapter

from vlmgraft.errors import AlignmentError, RecipeError
from vlmgraft.methods.spectral import Spectral
from vlmgraft.methods.task_arithmetic import TaskArithmetic


def naive_spectrum(s: np.ndarray, rule: str, k: int, eta: float) -> np.ndarray:
    first = np.arange(len(s)) < k
    if rule == "truncate":
        return s * first
    if rule == "rank_one":
        return np.sqrt((s**2).sum() / first.sum()) * first
    if rule == "iso":
        return np.full_like(s, s.mean())
    count = next(n for n in range(1, len(s) + 1) if s[:n].sum() >= eta * s.sum())
    return s * (np.arange(len(s)) < count) * s.sum() / s[:count].sum()


def naive(method: Spectral, fake: Fake, k: int) -> dict[str, torch.Tensor]:
    merged = {}
    for name, tau in fake.tau().items():
        U, s, Vh = np.linalg.svd(tau.double().numpy(), full_matrices=False)
        f = np.stack([naive_spectrum(row, method.rule, k, method.eta) for row in s.reshape(-1, s.shape[-1])])
        update = (U * f.reshape(s.shape)[..., None, :]) @ Vh
        merged[name] = fake.models["vlm"][name] + method.scale * torch.from_numpy(update).float()
    return merged


@pytest.mark.parametrize(
    ("options", "k"),
    [
        ({"rule": "truncate", "rank": 3, "scale": 0.7}, 3),
        ({"rule": "truncate", "rank": 1}, 1),
        ({"rule": "rank_one", "scale": 0.7}, 1),
        ({"rule": "rank_one", "rank": 2}, 2),
        ({"rule": "star"}, 0),
        ({"rule": "star", "eta": 0.8, "scale": 0.5}, 0),
        ({"rule": "iso", "scale": 0.5}, 0),
    ],
)
def test_it_is_the_rule_on_every_matrix_and_every_expert(options: dict[str, Any], k: int) -> None:
    fake = Fake(models(), chunk=10**6)
    method = Spectral(**options)
    expected = naive(method, fake, k)
    for name, merged in run(method, fake).items():
        torch.testing.assert_close(merged, expected[name], atol=2e-5, rtol=1e-5)


def test_identities() -> None:
    """λ = 0 is the VLM's very object; the full rank is task arithmetic, also where it is computed."""
    fake = Fake(models())
    for name, merged in run(Spectral(scale=0.0), fake).items():
        assert merged.equal(fake.models["vlm"][name])
    arithmetic = run(TaskArithmetic(0.6), fake)
    for rank in ("full", 99, {"energy": 1.0}):
        for name, merged in run(Spectral("truncate", rank, scale=0.6), fake).items():
            torch.testing.assert_close(merged, arithmetic[name], atol=1e-5, rtol=1e-5)
    twice = [run(Spectral("truncate", 2), fake) for _ in range(2)]
    assert all(twice[0][name].equal(twice[1][name]) for name in fake.names)


def test_a_donor_that_is_its_base_changes_nothing() -> None:
    found = models()
    fake = Fake({**found, "donor": found["donor_base"]})
    for rule in ("truncate", "rank_one", "star", "iso"):
        assert all(m.equal(fake.models["vlm"][n]) for n, m in run(Spectral(rule), fake).items())


def test_vectors_are_refused() -> None:
    with pytest.raises(AlignmentError, match="leave it out of `modules`"):
        run(Spectral(), Fake(models(shapes={"model.layers.0.input_layernorm.weight": (7,)})))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": {"energy": 1.5}}, "rank"),
        ({"rule": "star", "rank": 3}, "set eta"),
        ({"rule": "iso", "rank": 3}, "rank"),
        ({"eta": 0.0}, "eta"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Spectral(**options)


def test_the_recipe_validates() -> None:
    adapter = TypeAdapter(Spectral)
    assert adapter.validate_python({"rule": "truncate", "rank": {"energy": 0.5}}).rank == {"energy": 0.5}
    assert adapter.validate_python({"scale": {"mlp": 1.0, "attention": 0.5}}).scale == {"mlp": 1.0, "attention": 0.5}
