"""mergekit's recipes: translated where both tools compute the same, refused with the remedy elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.errors import RecipeError
from vlmgraft.recipe import load_recipe
from vlmgraft.recipe.mergekit import translate


def mergekit(method: str, *weights: float, **more: Any) -> dict[str, Any]:
    models = [{"model": name, "parameters": {"weight": w}} for name, w in zip(("v", "d"), weights, strict=True)]
    base = {} if method == "linear" else {"base_model": "b"}
    return {"merge_method": method, "models": models, **base, **more}


def test_task_arithmetic_with_the_vlm_at_one_is_ours() -> None:
    recipe = load_recipe(mergekit("task_arithmetic", 1.0, 0.3, dtype="bfloat16"))
    assert (recipe.vlm, recipe.donor, recipe.donor_base, recipe.vlm_base) == ("v", "d", "b", None)
    assert recipe.method.scale == 0.3 and recipe.modules == ("all",)
    assert any("dtype: dropped" in note for note in recipe.notes)
    assert any("v, is taken as the VLM" in note for note in recipe.notes)


def test_linear_weights_are_normalised() -> None:
    assert load_recipe(mergekit("linear", 3.0, 1.0)).method.vlm_weight == 0.75
    raw = mergekit("linear", 0.9, 0.1, parameters={"normalize": False})
    assert load_recipe(raw).method.vlm_weight == pytest.approx(0.9)


def test_ties_takes_mergekits_variants_and_both_bases() -> None:
    recipe, _ = translate(mergekit("ties", 1.0, 0.5, parameters={"density": 0.4, "lambda": 0.8}))
    assert recipe["donor_base"] == recipe["vlm_base"] == "b"
    assert recipe["method"] == {
        "name": "ties",
        "density": 0.4,
        "weights": [1.0, 0.5],
        "scale": 0.8,
        "trim": "tensor",
        "election": "weighted",
        "combine": "weighted_mean",
    }


def test_dare_options() -> None:
    recipe, notes = translate(mergekit("dare_ties", 1.0, 0.5, parameters={"density": 0.4, "rescale": False}))
    assert recipe["method"] == {
        "name": "dare_ties",
        "density": 0.4,
        "weights": [1.0, 0.5],
        "scale": 1.0,
        "rescale": False,
        "election": "weighted",
        "combine": "sum",
    }
    assert any("seed" in note for note in notes)


def test_dare_linear_divides_by_all_weights_when_it_normalises() -> None:
    recipe, _ = translate(mergekit("dare_linear", 1.0, 0.25, parameters={"density": 0.4, "normalize": True}))
    assert recipe["method"]["weights"] == [0.8, 0.2]
    recipe, _ = translate(mergekit("dare_linear", 1.0, 0.25, parameters={"density": 0.4}))
    assert recipe["method"]["weights"] == [1.0, 0.25]


def test_the_vlm_is_told_by_its_config_and_the_base_may_be_listed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    models = [
        {"model": "b"},
        {"model": "d", "parameters": {"weight": 0.3}},
        {"model": str(tmp_path), "parameters": {"weight": 1}},
    ]
    recipe = load_recipe({"merge_method": "task_arithmetic", "models": models, "base_model": "b"}, ["method.scale=0.4"])
    assert (recipe.vlm, recipe.donor, recipe.method.scale) == (str(tmp_path), "d", 0.4)
    assert not any("taken as the VLM" in note for note in recipe.notes)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (mergekit("slerp", 1.0, 1.0), "merge_method: 'slerp' is not shared"),
        ({"slices": [], "merge_method": "passthrough"}, "slices: .*layers: 0-27"),
        ({"models": []}, "merge_method: None"),
        (mergekit("task_arithmetic", 0.7, 0.3), "the VLM's is 0.7.*give it weight 1"),
        (mergekit("task_arithmetic", 1.0, 0.3, parameters={"normalize": True}), "without normalize"),
        (mergekit("linear", 0.5, 0.1, parameters={"normalize": False}), "do not add up to one"),
        (mergekit("ties", 1.0, 1.0, parameters={"gamma": 1}), r"parameters\.gamma: not translated"),
        (mergekit("ties", 1.0, 1.0, tokens={}), "tokens: this key"),
        ({"merge_method": "ties", "models": [{"model": "v"}], "base_model": "b"}, "models: 1 besides the base"),
        ({"merge_method": "ties", "models": [{"model": "v"}, {"model": "d"}]}, "base_model: ties needs it"),
        ({"merge_method": "ties", "models": ["v", "d"], "base_model": "b"}, r"models\[0\]: 'v' has no"),
    ],
)
def test_what_has_no_counterpart_is_refused(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(raw)


def test_gradients_and_unequal_densities_are_refused() -> None:
    raw = mergekit("ties", 1.0, 0.5)
    raw["models"][0]["parameters"]["weight"] = [0, 1]
    with pytest.raises(RecipeError, match=r"weight: \[0, 1\] is not a plain number"):
        load_recipe(raw)
    raw = mergekit("ties", 1.0, 0.5, parameters={"density": 0.5})
    raw["models"][0]["parameters"]["density"] = 0.2
    with pytest.raises(RecipeError, match=r"density: \[0\.2, 0\.5\] differ"):
        load_recipe(raw)
