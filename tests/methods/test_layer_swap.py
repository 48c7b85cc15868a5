"""Layer swap against the formula, its identities and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_merge import Fake, models, run
from pydantic import TypeAdapter

from vlmgraft.errors import RecipeError
from vlmgraft.methods.base import TensorContext
from vlmgraft.methods.layer_swap import LayerSwap
from vlmgraft.methods.linear import Linear


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
    assert LayerSwap(0.5, 0).combine(piece, TensorContext("n", (3,), 3, 0)) is piece["vlm"]
    assert (
        LayerSwap(0.5, 0)
        .combine(piece, TensorContext("norm", (3,), 3))
        .equal(Linear(0.5).combine(piece, TensorContext("norm", (3,), 3)))
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


def test_the_recipe_validates() -> None:
    adapter = TypeAdapter(LayerSwap)
    assert adapter.validate_python({}).kept == frozenset(range(6))
    assert adapter.validate_python({"keep_layers": [1, 2]}).kept == {1, 2}
    assert adapter.validate_python({"keep_layers": 0}).kept == {0}
