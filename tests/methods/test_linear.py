"""The weighted mean against its formula and PEFT's sum of models; layer swap against its identities and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_merge import Fake, models, run
from peft.utils import merge_utils
from pydantic import TypeAdapter

from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import TensorContext
from vlmgraft.methods.linear import LayerSwap, Linear


@pytest.mark.parametrize("weight", [0.9, 0.3, 0.0])
def test_it_is_the_formula_and_pefts(weight: float) -> None:
    fake = Fake(models())
    for name, merged in run(Linear(weight), fake).items():
        vlm, donor = fake.models["vlm"][name], fake.models["donor"][name]
        torch.testing.assert_close(merged, weight * vlm + (1 - weight) * donor)
        torch.testing.assert_close(
            merged, merge_utils.task_arithmetic([vlm, donor], torch.tensor([weight, 1 - weight]))
        )


def test_weights_that_do_not_add_up_to_one() -> None:
    """PlaM's 0.9 and 0.2, against PEFT's sum of models; with a sum of one it is the mean, bit for bit."""
    fake = Fake(models())
    for name, merged in run(Linear(0.9, 1.1), fake).items():
        pair = [fake.models["vlm"][name], fake.models["donor"][name]]
        torch.testing.assert_close(merged, merge_utils.task_arithmetic(pair, torch.tensor([0.9, 0.2])))
    mean = run(Linear(0.9), fake)
    assert all(merged.equal(mean[name]) for name, merged in run(Linear(0.9, 1.0), fake).items())


def test_all_weight_on_the_vlm_is_the_vlm_and_none_is_the_donor() -> None:
    fake = Fake(models())
    assert all(one.equal(fake.models["vlm"][name]) for name, one in run(Linear(1.0), fake).items())
    assert all(one.equal(fake.models["donor"][name]) for name, one in run(Linear(0.0), fake).items())


def test_weights_over_depth_and_by_group() -> None:
    fake = Fake(models())
    depth, group = run(Linear([1.0, 0.0]), fake), run(Linear({"attention": 1.0, "mlp": 0.0}), fake)
    for name in fake.names:
        share = (1.0, 0.5, 0.0)[int(name.split(".")[2])]
        vlm, donor = fake.models["vlm"][name], fake.models["donor"][name]
        torch.testing.assert_close(depth[name], share * vlm + (1 - share) * donor)
        assert group[name].equal(vlm if "attn" in name else donor)


def test_a_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(RecipeError, match="vlm_weight"):
        Linear(float("nan"))


@pytest.mark.parametrize("keep", ["0-1", [0, 1], "0,1"])
def test_kept_layers_are_the_vlm_and_the_others_the_mean(keep: Any) -> None:
    fake = Fake(models())
    for name, merged in run(LayerSwap(0.7, keep), fake).items():
        vlm, donor = fake.models["vlm"][name], fake.models["donor"][name]
        if int(name.split(".")[2]) <= 1:
            assert merged.equal(vlm)
        else:
            torch.testing.assert_close(merged, 0.7 * vlm + 0.3 * donor)


def test_a_kept_layer_gives_back_the_very_object_and_no_layer_is_averaged() -> None:
    piece = {"vlm": torch.ones(3), "donor": torch.zeros(3)}
    assert LayerSwap(0.5, 0).apply(piece, TensorContext("n", (3,), 3, 0)) is piece["vlm"]
    assert (
        LayerSwap(0.5, 0)
        .apply(piece, TensorContext("norm", (3,), 3))
        .equal(Linear(0.5).apply(piece, TensorContext("norm", (3,), 3)))
    )


@pytest.mark.parametrize("keep", ["early", "", "all", [], "5-2"])
def test_what_is_no_range_is_refused(keep: Any) -> None:
    with pytest.raises(RecipeError, match="keep_layers"):
        LayerSwap(keep_layers=keep)


def test_layers_that_do_not_fit_the_model_are_refused_before_a_merge() -> None:
    fake = Fake(models())
    with pytest.raises(RecipeError, match="5 is beyond the last layer, 2"):
        run(LayerSwap(), fake)
    with pytest.raises(RecipeError, match="nothing is left"):
        run(LayerSwap(keep_layers="0-2"), fake)


def test_the_recipe_of_layer_swap_validates() -> None:
    adapter = TypeAdapter(LayerSwap)
    assert adapter.validate_python({}).kept == frozenset(range(6))
    assert adapter.validate_python({"keep_layers": [1, 2]}).kept == {1, 2}
    assert adapter.validate_python({"keep_layers": 0}).kept == {0}
