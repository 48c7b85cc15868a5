"""FRANK against its formula on whole layers, its priors, and the fit of its exponential."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from fake_merge import SHAPES, Fake, models, run
from hypothesis import given, settings, strategies as st
from pydantic import TypeAdapter

from vlmgraft.errors import RecipeError
from vlmgraft.methods.frank import Frank, fit_decay

ATTENTION = [0.5, 0.3, 0.1]


def naive(fake: Fake, prior: list[float]) -> dict[str, torch.Tensor]:
    own, donor, merged = fake.tau("vlm"), fake.tau("donor"), {}
    for name, base in fake.models["vlm_base"].items():
        layer = name.split(".")[2]
        same = [other for other in fake.names if other.split(".")[2] == layer]
        squares = [sum(float((tau[other].double() ** 2).sum()) for other in same) for tau in (own, donor)]
        visual = prior[int(layer)] if layer.isdigit() else 0.5
        total = visual * squares[0] + (1 - visual) * squares[1]
        merged[name] = base + visual * squares[0] / total * own[name] + (1 - visual) * squares[1] / total * donor[name]
    return merged


@pytest.mark.parametrize(
    ("options", "prior"),
    [
        ({"prior": "none"}, [0.5] * 3),
        ({"decay": 0.7}, [math.exp(-0.7 * layer) for layer in range(3)]),
        ({"decay": -0.7}, [math.exp(0.7 * (layer - 2)) for layer in range(3)]),
        (
            {"decay": 0.7, "prior": "literal"},
            [math.exp(-0.7 * layer) / sum(math.exp(-0.7 * other) for other in range(3)) for layer in range(3)],
        ),
    ],
)
@pytest.mark.parametrize("chunk", [8, 10**6])
def test_it_is_the_formula(options: dict[str, Any], prior: list[float], chunk: int) -> None:
    fake = Fake(models(shapes={**SHAPES, "model.norm.weight": (7,)}), chunk)
    expected = naive(fake, prior)
    for name, merged in run(Frank(**options), fake).items():
        torch.testing.assert_close(merged, expected[name], atol=1e-6, rtol=1e-5)


def test_priors() -> None:
    """max_rescaled: the first layer's is one; literal: they sum to one; both fall as the attention does."""
    rescaled = Frank(visual_attention=ATTENTION).visual_prior(3)
    literal = Frank("literal", visual_attention=ATTENTION).visual_prior(3)
    assert rescaled[0] == 1 and sum(literal) == pytest.approx(1)
    assert [a / rescaled[0] for a in rescaled] == pytest.approx([a / literal[0] for a in literal])
    assert rescaled[0] > rescaled[1] > rescaled[2] > 0


def test_a_layer_that_is_all_vision_stays_the_vlm() -> None:
    fake = Fake(models())
    merged = run(Frank(decay=0.5), fake)
    for name in fake.names:
        assert merged[name].equal(fake.models["vlm"][name]) == (".layers.0." in name)


def test_the_weights_can_be_printed() -> None:
    method = Frank(decay=0.5).prepare(Fake(models()))
    assert [weights.layer for weights in method.layers] == [0, 1, 2]
    assert all(weights.vlm + weights.donor == pytest.approx(1) for weights in method.layers)
    assert len(method.notes()) == 3 and method.notes()[0].startswith("frank, layer 0: λ_V 1.0000, λ_R 0.0000")


def test_a_model_that_did_not_move_takes_the_others_side() -> None:
    found = models()
    still = Fake({**found, "donor": found["donor_base"]})
    for name, merged in run(Frank("none"), still).items():
        assert merged.equal(found["vlm"][name])


@settings(max_examples=15, deadline=None)
@given(st.floats(-1, 2), st.floats(0.05, 1), st.integers(3, 40))
def test_an_exponential_is_found_again_by_the_fit(decay: float, height: float, layers: int) -> None:
    first = 0 if decay >= 0 else layers - 1
    shares = [height * math.exp(-decay * (layer - first)) for layer in range(layers)]
    assert fit_decay(shares) == pytest.approx(decay, abs=1e-5)


def test_equation_16_by_hand() -> None:
    """Shares e⁰, e⁻¹, e⁻¹, e⁻⁴ of layers 0 to 3: slope Σ(l − 1.5)(log a + 1.5)/Σ(l − 1.5)² = −6/5."""
    shares = [1.0, math.exp(-1), math.exp(-1), math.exp(-4)]
    assert fit_decay(shares) == pytest.approx(1.2, abs=1e-12)
    layers = [math.exp(-1.2 * layer) for layer in range(4)]
    assert Frank("literal", visual_attention=shares).visual_prior(4) == pytest.approx([w / sum(layers) for w in layers])


def test_late_layers_count_as_early_ones_do() -> None:
    """Shares that fall late, where a fit to the shares themselves would hardly fall; the reference is numpy."""
    shares = [0.9, 0.9, 0.85, 0.8, 0.7, 0.5, 0.2, 0.05]
    slope = np.polyfit(np.arange(8), np.log(shares), 1)[0]
    assert Frank(visual_attention=shares).visual_prior(8)[1] == pytest.approx(math.exp(slope))
    assert fit_decay(shares) == pytest.approx(-slope)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "visual_attention: missing"),
        ({"visual_attention": [0.5, 0.4, 0.3], "decay": 0.1}, "remove one"),
        ({"visual_attention": [0.5, 1.4]}, "shares from 0 to 1"),
        ({"visual_attention": [0.5]}, "two or more"),
        ({"visual_attention": [0.5, 0.0]}, "layer 1 has share 0, which has no logarithm"),
        ({"decay": float("nan")}, "decay"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Frank(**options)


def test_a_list_of_the_wrong_length_is_refused_before_a_merge() -> None:
    with pytest.raises(RecipeError, match="2 shares for 3 layers"):
        run(Frank(visual_attention=[0.5, 0.4]), Fake(models()))


def test_the_recipe_validates() -> None:
    adapter = TypeAdapter(Frank)
    assert adapter.validate_python({"decay": 0.1}).decay == 0.1
    assert adapter.validate_python({"decay": "fitted", "visual_attention": [0.5, 0.2]}).visual_attention == [0.5, 0.2]
