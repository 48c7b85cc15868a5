"""mergekit's recipes: translated where both tools compute the same, refused with the remedy elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmgraft.errors import RecipeError
from vlmgraft.recipe.mergekit import translate
from vlmgraft.recipe.model import load_recipe


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
    assert any("random numbers" in note for note in notes) and not any("L1 norm" in note for note in notes)


def test_linear_without_normalize_keeps_both_weights() -> None:
    recipe, _ = translate(mergekit("linear", 0.9, 0.2, parameters={"normalize": False}))
    assert recipe["method"] == {"name": "linear", "vlm_weight": 0.9, "weight_sum": pytest.approx(1.1)}


def test_dare_linear_divides_by_all_weights_when_it_normalises() -> None:
    recipe, _ = translate(mergekit("dare_linear", 1.0, 0.25, parameters={"density": 0.4, "normalize": True}))
    assert recipe["method"]["weights"] == [0.8, 0.2]
    recipe, _ = translate(mergekit("dare_linear", 1.0, 0.25, parameters={"density": 0.4}))
    assert recipe["method"]["weights"] == [1.0, 0.25]


def test_the_vlm_is_told_by_its_config_and_the_base_may_be_listed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "vision_config": {"depth": 2}}))
    models = [
        {"model": "b"},
        {"model": "d", "parameters": {"weight": 0.3}},
        {"model": str(tmp_path), "parameters": {"weight": 1}},
    ]
    recipe = load_recipe({"merge_method": "task_arithmetic", "models": models, "base_model": "b"}, ["method.scale=0.4"])
    assert (recipe.vlm, recipe.donor, recipe.method.scale) == (str(tmp_path), "d", 0.4)
    assert not any("taken as the VLM" in note for note in recipe.notes)


@pytest.mark.parametrize("lora", ["", "+adapter"])
def test_paths_beside_the_recipe_have_the_roles_of_its_own_folder(
    lora: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reference is looked up in the recipe's folder too, before the VLM is found by its config."""
    sub = tmp_path / "sub"
    for name in ("donor", "vlm", "base", "adapter"):
        (sub / name).mkdir(parents=True)
    (sub / "vlm" / "config.json").write_text(json.dumps({"vision_config": {"depth": 2}}))
    (sub / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "donor"}))
    models = [("donor" + lora, 0.5), ("./vlm", 1)]
    raw = mergekit("task_arithmetic", 1.0, 1.0, base_model={"model": {"path": "base"}})
    raw["models"] = [{"model": model, "parameters": {"weight": weight}} for model, weight in models]
    (sub / "mk.yaml").write_text(json.dumps(raw))  # JSON is YAML
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("sub/mk.yaml")
    assert (recipe.vlm, recipe.donor) == ("sub/vlm", "sub/adapter" if lora else "sub/donor")
    assert (recipe.donor_base, recipe.method.scale) == ("sub/base", 0.5)
    monkeypatch.chdir(sub)
    recipe = load_recipe("mk.yaml")
    assert (recipe.vlm, recipe.donor, recipe.method.scale) == ("./vlm", "adapter" if lora else "donor", 0.5)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (mergekit("karcher", 1.0, 1.0), "merge_method: 'karcher' is not shared"),
        ({"slices": [], "merge_method": "passthrough"}, "slices: .*layers: 0-27"),
        ({"models": []}, "merge_method: None"),
        (mergekit("task_arithmetic", 0.7, 0.3), "the VLM's is 0.7.*give it weight 1"),
        (mergekit("task_arithmetic", 1.0, 0.3, parameters={"normalize": True}), "without normalize"),
        (mergekit("linear", 0.5, -0.5), "add up to zero"),
        (
            mergekit("ties", 1.0, 1.0, parameters={"gamma": 1}),
            r"parameters\.gamma: not translated from mergekit's ties",
        ),
        (mergekit("ties", 1.0, 1.0, tokens={}), "tokens: this key"),
        ({"merge_method": "ties", "models": [{"model": "v", "weight": 1}]}, r"models\[0\]\.weight: .*parameters"),
        ({"merge_method": "ties", "models": [{"model": {"path": "v"}}]}, "no path or hub id"),
        ({"merge_method": "ties", "models": [{"model": {"model": {"path": "v", "size": 1}}}]}, "write path: and rev"),
        (
            {"merge_method": "ties", "models": [{"model": {"model": "v", "override_architecture": "X"}}]},
            "no path or hub",
        ),
        ({"merge_method": "ties", "models": [{"model": "v"}], "base_model": "b"}, "models: 1 besides the base"),
        ({"merge_method": "ties", "models": [{"model": "v"}, {"model": "d"}]}, "base_model: ties needs it"),
        ({"merge_method": "ties", "models": ["v", "d"], "base_model": "b"}, r"models\[0\]: 'v' has no"),
    ],
)
def test_what_has_no_counterpart_is_refused(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(raw)


def test_references_as_mappings_with_revisions() -> None:
    raw = mergekit("task_arithmetic", 1.0, 0.3)
    raw["models"][1]["model"] = {"model": {"path": "org/d", "revision": "v2"}}
    raw["base_model"] = {"model": "b"}
    recipe, _ = translate(raw)
    assert (recipe["vlm"], recipe["donor"], recipe["donor_base"]) == ("v", "org/d@v2", "b")


@pytest.mark.parametrize("written", ["{base}+{lora}", {"model": "{base}", "lora": {"path": "{lora}"}}])
def test_an_adapter_on_its_base_is_the_donor(written: Any, tmp_path: Path) -> None:
    """mergekit merges it first; here it is applied while reading, on the base that its own config names."""
    lora, base = str(tmp_path / "lora"), str(tmp_path / "base")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    text = json.dumps(written).replace("{base}", base).replace("{lora}", lora)
    raw = mergekit("task_arithmetic", 1.0, 0.3)
    raw["models"][1]["model"] = json.loads(text)
    assert translate(raw)[0]["donor"] == lora
    raw["models"][1]["model"] = f"other+{lora}"
    with pytest.raises(
        RecipeError, match=r"models\[1\]\.model: puts the adapter .*lora on other, but its adapter_config"
    ):
        translate(raw)
    raw["models"][1]["model"] = "org/base+org/lora"
    recipe, notes = translate(raw)
    assert recipe["donor"] == "org/lora" and any("the recipe says org/base" in note for note in notes)


def test_negative_weights_elect_and_divide_as_mergekit_does() -> None:
    """Entry by entry from mergekit's definition: w·τ votes, what has the sum's sign is added, Σ w of those divides."""
    recipe, _ = translate(mergekit("ties", 1.0, -0.5))
    method = load_recipe(mergekit("ties", 1.0, -0.5)).method
    assert recipe["method"]["weights"] == [1.0, -0.5]
    torch.manual_seed(0)
    taus, weights = torch.randn(2, 7824), (1.0, -0.5)
    merged = method.combined(taus[0].clone(), taus[1].clone(), weights)
    for got, pair in zip(merged.tolist(), taus.T.tolist(), strict=True):
        votes = [w * tau for w, tau in zip(weights, pair, strict=True)]
        sign = 1 if sum(votes) >= 0 else -1
        kept = [(w, vote) for w, vote in zip(weights, votes, strict=True) if vote * sign > 0]
        expected = sum(vote for _, vote in kept) / (sum(w for w, _ in kept) or 1)
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert translate(mergekit("task_arithmetic", 1.0, "3e-1"))[0]["method"]["scale"] == 0.3  # type: ignore[arg-type]


def test_gradients_are_refused() -> None:
    raw = mergekit("ties", 1.0, 0.5)
    raw["models"][0]["parameters"]["weight"] = [0, 1]
    with pytest.raises(RecipeError, match=r"weight: \[0, 1\] is not a plain number"):
        load_recipe(raw)


def test_a_density_per_model() -> None:
    raw = mergekit("ties", 1.0, 0.5, parameters={"density": 0.5})
    raw["models"][0]["parameters"]["density"] = 0.2
    method = load_recipe(raw).method
    assert (method.density, method.donor_density) == (0.2, 0.5)


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("sce", {"select_topk": 0.3}, {"name": "sce", "density": 0.3}),
        ("model_stock", {"filter_wise": True}, {"name": "model_stock", "filter_wise": True}),
        (
            "della",
            {"density": 0.5, "epsilon": 0.1},
            {"name": "della", "epsilon": 0.1, "rescale": "l1", "election": "weighted", "combine": "weighted_mean"},
        ),
        (
            "della_linear",
            {"density": 0.5, "rescale": False, "normalize": True},
            {"name": "della", "epsilon": 0.15, "rescale": "none", "election": "none", "weights": [2 / 3, 1 / 3]},
        ),
        ("breadcrumbs", {"density": 0.5}, {"name": "breadcrumbs", "gamma": 0.01, "weights": [1.0, 0.5]}),
        (
            "breadcrumbs_ties",
            {"density": 0.5, "gamma": 0.02, "lambda": 0.3},
            {"name": "breadcrumbs", "gamma": 0.02, "election": "weighted", "combine": "sum", "scale": 0.3},
        ),
    ],
)
def test_further_methods(name: str, parameters: dict[str, Any], expected: dict[str, Any]) -> None:
    raw = mergekit(name, 1.0, 0.5, parameters=parameters)
    if name in ("sce", "model_stock"):
        raw["models"] = [{"model": "v"}, {"model": "d"}]
    recipe, _ = translate(raw)
    assert recipe["donor_base"] == recipe["vlm_base"] == "b"
    assert {key: recipe["method"][key] for key in expected} == expected
    assert load_recipe(raw).method.name == expected["name"]


@pytest.mark.parametrize(("base", "share"), [("v", 0.25), ("d", 0.75)])
def test_slerp_counts_from_its_base(base: str, share: float) -> None:
    raw = {"merge_method": "slerp", "models": [{"model": "v"}, {"model": "d"}], "base_model": base}
    recipe, _ = translate({**raw, "parameters": {"t": 0.25}})
    assert recipe["method"] == {"name": "slerp", "t": share} and "donor_base" not in recipe
    with pytest.raises(RecipeError, match=r"parameters\.t: missing"):
        translate(raw)
    with pytest.raises(RecipeError, match="'x' is neither of the two"):
        translate({**raw, "base_model": "x", "parameters": {"t": 0.25}})


def test_options_that_differ_or_have_no_counterpart_are_refused() -> None:
    raw = mergekit("breadcrumbs", 1.0, 0.5)
    raw["models"][0]["parameters"]["gamma"] = 0.1
    with pytest.raises(RecipeError, match=r"gamma: \[0\.1, 0\.01\] differ"):
        translate(raw)
    with pytest.raises(RecipeError, match="rescale: ties does not rescale"):
        translate(mergekit("ties", 1.0, 0.5, parameters={"rescale": True}))


VALUES = ([], [1], {}, {"a": []}, None, True, -1, 1e400, "", "x" * 5000, [{"model": "v"}], {"path": []})


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "slerp", "sce", "model_stock", "della"])
def test_any_value_at_any_key_is_translated_or_refused(method: str) -> None:
    """Lists and mappings where names are looked up, numbers where mappings are: a sentence, never a traceback."""

    def whole() -> dict[str, Any]:
        raw = mergekit(method, 1.0, 0.3, parameters={"density": 0.5, "t": 0.3}, dtype="bfloat16", tokenizer_source="x")
        raw["models"][1]["model"] = {"model": {"path": "d", "revision": "main"}, "lora": {"path": "l"}}
        return raw

    for value in VALUES:
        for key in whole():
            _translated_or_refused({**whole(), key: value})
        for key in ("model", "parameters"):
            raw = whole()
            raw["models"][1][key] = value
            _translated_or_refused(raw)
        for key in ("weight", "density", "t", "lambda", "normalize", "rescale", "epsilon", "gamma", "select_topk"):
            _translated_or_refused({**whole(), "parameters": {key: value}})


def _translated_or_refused(raw: dict[str, Any]) -> None:
    try:
        load_recipe(raw, need_method=False)
    except RecipeError as error:
        assert str(error).strip()
