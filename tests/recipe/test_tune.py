"""Recipes of a fine-tuning: what is taken, what is refused and in which words, and that writing one loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlmgraft.errors import RecipeError
from vlmgraft.recipe.tune import dump_tune_recipe, load_tune_recipe, save_tune_recipe

PLAIN: dict[str, Any] = {"vlm": "vlm", "donor": "donor", "data": {"train": "traces.jsonl"}}


@pytest.mark.parametrize(
    "modules, expected",
    [
        ("mlp", ("mlp",)),
        (["attention", "*.gate_proj.*"], ("attention", "*.gate_proj.*")),
        ({"attention": 1, "mlp": 0.5}, {"attention": 1.0, "mlp": 0.5}),
    ],
)
def test_modules_are_one_a_list_or_shares_and_survive_a_file(modules: Any, expected: Any, tmp_path: Path) -> None:
    recipe = load_tune_recipe(PLAIN | {"prior": {"modules": modules}})
    assert recipe.prior.modules == expected
    assert load_tune_recipe(dump_tune_recipe(recipe)) == recipe
    save_tune_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_tune_recipe(tmp_path / "recipe.yaml").prior == recipe.prior


@pytest.mark.parametrize(
    "change, said",
    [
        ({"prior": {"modules": {"attention": -1}}}, r"prior\.modules.*attention"),
        ({"prior": {"modules": {"attention": float("nan")}}}, r"prior\.modules"),
        ({"prior": {"strength": -1}}, r"prior\.strength"),
        ({"prior": {"delta": "base"}}, "donor_base: missing"),
        ({"prior": {"factors": "f"}}, r"prior\.factors: are those of prior\.gates"),
        ({"prior": {"rescale": True}}, r"prior\.rescale: only absolute .*, not adaptive"),
        ({"donor": None}, "donor: missing"),
        ({"merge_adapter": True}, "there is no adapter without `lora`"),
        ({"lora": {"r": 2}, "prior": {"when": "backward"}}, r"prior\.when: backward"),
        ({"prior": {"strenght": 1}}, "did you mean 'strength'"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_refusals_name_the_key(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_tune_recipe(PLAIN | change)


def test_a_mode_alone_is_a_prior() -> None:
    assert load_tune_recipe(PLAIN | {"prior": "none"}).prior.mode == "none"


def test_keys_that_have_no_effect_without_a_prior_are_listed() -> None:
    """Also after a file, where every default is written out."""
    prior = {"mode": "none", "gates": "nowhere", "delta": "base", "strength": 1.0}
    recipe = load_tune_recipe(PLAIN | {"prior": prior})
    assert recipe.prior.unused() == ["prior.delta", "prior.gates"]
    assert load_tune_recipe(dump_tune_recipe(recipe)).prior.unused() == ["prior.delta", "prior.gates"]
    assert load_tune_recipe(PLAIN | {"prior": {"gates": None, "strength": 0.5}}).prior.unused() == []
