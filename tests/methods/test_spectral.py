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

RULES: tuple[Any, ...] = ("truncate", "rank_k", "star", "iso", "sar")


def naive_spectrum(s: np.ndarray, rule: str, k: int, eta: float) -> np.ndarray:
    first = np.arange(len(s)) < k
    if rule == "truncate":
        return s * first
    if rule == "rank_k":
        return s * first * np.linalg.norm(s) / np.linalg.norm(s[:k])
    if rule == "iso":
        return np.full_like(s, s.mean())
    count = next(n for n in range(1, len(s) + 1) if s[:n].sum() >= eta * s.sum())
    return s * (np.arange(len(s)) < count) * s.sum() / s[:count].sum()


def naive(method: Spectral, fake: Fake, k: int) -> dict[str, torch.Tensor]:
    merged = {}
    for name, tau in fake.tau().items():
        vlm, base = (fake.models[key][name].double().numpy() for key in ("vlm", "donor_base"))
        decomposed = base if method.rule == "sar" else tau.double().numpy()
        U, s, Vh = np.linalg.svd(decomposed, full_matrices=False)
        if method.rule == "sar":
            U, V = U[..., :k], Vh[..., :k, :].swapaxes(-1, -2)
            update = U @ U.swapaxes(-1, -2) @ tau.double().numpy() @ V @ V.swapaxes(-1, -2)
        else:
            f = np.stack([naive_spectrum(row, method.rule, k, method.eta) for row in s.reshape(-1, s.shape[-1])])
            update = (U * f.reshape(s.shape)[..., None, :]) @ Vh
        merged[name] = torch.from_numpy(vlm + method.interpolation * (base - vlm) + method.scale * update).float()
    return merged


@pytest.mark.parametrize(
    ("options", "k"),
    [
        ({"rule": "truncate", "rank": 3, "scale": 0.7}, 3),
        ({"rule": "truncate", "rank": 1}, 1),
        ({"rule": "rank_k", "scale": 0.7}, 1),
        ({"rule": "rank_k", "rank": 3}, 3),
        ({"rule": "rank_k", "scale": 0.05, "interpolation": 0.05}, 1),
        ({"rule": "sar"}, 1),
        ({"rule": "sar", "rank": 3, "scale": 0.7, "interpolation": -0.1}, 3),
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


def test_a_scale_of_zero_is_the_vlm_bit_for_bit() -> None:
    fake = Fake(models())
    for rule in RULES:
        merged = run(Spectral(rule, scale=0.0), fake)
        assert all(merged[name].equal(fake.models["vlm"][name]) for name in fake.names)


@pytest.mark.parametrize("rule", RULES)
def test_without_interpolation_nothing_is_added(rule: Any) -> None:
    """a = 0 is the rule alone, bit for bit; a = 1 without a rule is the donor's base."""
    fake = Fake(models())
    plain, zero = run(Spectral(rule, scale=0.6), fake), run(Spectral(rule, scale=0.6, interpolation=0.0), fake)
    assert all(merged.equal(zero[name]) for name, merged in plain.items())
    for name, merged in run(Spectral(rule, scale=0.0, interpolation=1.0), fake).items():
        torch.testing.assert_close(merged, fake.models["donor_base"][name])


def test_interpolation_by_depth_and_group() -> None:
    """A list over depth is zero in the first of three layers; a map moves attention alone."""
    fake = Fake(models())
    for option, moved in (([0.0, 0.5, 1.0], ".layers.0."), ({"attention": 0.1, "mlp": 0.0}, ".mlp.")):
        merged = run(Spectral(scale=0.0, interpolation=option), fake)
        for name in fake.names:
            assert merged[name].equal(fake.models["vlm"][name]) == (moved in name)


def test_all_directions_are_task_arithmetic() -> None:
    """truncate and rank_k at full rank, also where it is computed; sar where U and V of the base are square."""
    fake, square = Fake(models()), Fake(models(shapes={"model.layers.0.self_attn.q_proj.weight": (8, 8)}))
    ranks: tuple[Any, ...] = ("full", 99, {"energy": 1.0})
    for rule, tensors in (("truncate", fake), ("rank_k", fake), ("sar", square)):
        arithmetic = run(TaskArithmetic(0.6), tensors)
        for rank in ranks:
            for name, merged in run(Spectral(rule, rank, scale=0.6), tensors).items():  # type: ignore[arg-type]
                torch.testing.assert_close(merged, arithmetic[name], atol=1e-5, rtol=1e-5)
    twice = [run(Spectral("truncate", 2), fake) for _ in range(2)]
    assert all(twice[0][name].equal(twice[1][name]) for name in fake.names)


def test_a_donor_that_is_its_base_changes_nothing() -> None:
    found = models()
    fake = Fake({**found, "donor": found["donor_base"]})
    for rule in RULES:
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
