"""Recipes: strict keys, overrides, round trips, and an answer without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, strategies as st
from sample_method import Questions, Sample, raw

from vlmgraft.errors import RecipeError
from vlmgraft.methods import METHODS
from vlmgraft.recipe.model import dump_recipe, load_recipe, parse_size

pytestmark = pytest.mark.usefixtures("sample")


def test_defaults_come_from_the_method() -> None:
    recipe = load_recipe(raw(method="sample"))
    assert recipe.method == Sample()
    assert (recipe.modules, recipe.layers, recipe.output.shard_bytes) == (("all",), "all", 5 * 10**9)
    assert load_recipe(raw(modules="attention")).modules == ("attention",)


def test_overrides_reach_every_level_and_are_typed() -> None:
    overrides = (
        "method.name=sample method.scale=0.5 method.calibration.data=x.jsonl method.calibration.samples=8 "
        "modules=[attention] layers=0-3 output.shard_size=1MiB"
    )
    recipe = load_recipe(raw(method="task_arithmetic"), overrides.split())
    assert recipe.method == Sample(0.5, calibration=Questions("x.jsonl", 8))
    assert (recipe.modules, recipe.layers, recipe.output.shard_bytes) == (("attention",), "0-3", 2**20)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modulse": ["mlp"]}, "modulse: unknown key; did you mean 'modules'"),
        ({"scale": 2}, "scale: belongs under method"),
        ({"method": {"name": "sample", "scael": 2}}, r"method\.scael: unknown key; did you mean 'scale'"),
        (
            {"method": {"name": "sample", "calibration": {"data": "x", "sample": 2}}},
            r"method\.calibration\.sample: .*'samples'",
        ),
        ({"method": {"name": "sample", "calibration": {}}}, r"method\.calibration\.\S*data: missing"),
        ({"method": {"name": "sampel"}}, "'sampel' is no method; did you mean 'sample'"),
        ({"method": {"scale": 1}}, "None is no method"),
        ({"method": {"name": "sample", "rule": "other"}}, r"method\.rule: .*'truncate' or 'star', got 'other'"),
        (
            {"method": {"name": "sample", "scale": "much"}},
            r"^method\.scale: .*valid number.* or .*a list or .*a mapping, got 'much'$",
        ),
        ({"method": 3}, "neither a name nor a mapping"),
        ({"method": None}, "method: missing"),
        ({"vlm_base": None}, "vlm_base: method sample needs it: give the text model"),
        ({"output": {"shard_size": "big"}}, r"output\.shard_size: .*'big' is not a size"),
        ({"output": {"shards": 3}}, r"output\.shards: unknown key"),
        ({"vlm": 3}, "vlm: .*got 3"),
        ({"vlm": None}, "vlm: .*got None"),
        ({"modules": 3}, "modules: Input should be a list, got 3"),
        ({"output": 3}, "output: Input should be a mapping, got 3"),
    ],
)
def test_bad_recipes_are_refused_with_the_path_and_the_remedy(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(raw(**changes))


def test_a_missing_key_is_named() -> None:
    with pytest.raises(RecipeError, match="donor: missing"):
        load_recipe({"vlm": "v", "method": "linear"})


@given(
    scale=st.floats(0, 2) | st.lists(st.floats(0, 2), min_size=2, max_size=3) | st.just({"mlp": 0.5}),
    layers=st.sampled_from(["all", "0-3", 2]) | st.lists(st.integers(0, 9), min_size=1, max_size=3),
    calibration=st.none() | st.builds(dict, data=st.just("x"), samples=st.integers(1, 9)),
)
def test_a_dumped_recipe_replays_it(scale: Any, layers: Any, calibration: Any) -> None:
    METHODS["sample"] = Sample
    recipe = load_recipe(raw(method={"name": "sample", "scale": scale, "calibration": calibration}, layers=layers))
    text = yaml.safe_dump(dump_recipe(recipe))
    assert load_recipe(yaml.safe_load(text)) == recipe


def test_a_saved_recipe_writes_every_option(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(dump_recipe(load_recipe(raw())), sort_keys=False))
    written = yaml.safe_load(path.read_text())
    assert list(written)[:5] == ["vlm", "donor", "donor_base", "vlm_base", "method"]
    assert written["method"] == {
        "name": "sample",
        "scale": 1.0,
        "rule": "truncate",
        "calibration": {"data": "q.jsonl", "samples": 512},
    }
    assert written["modules"] == ["all"] and written["output"] == {
        "dtype": "vlm",
        "shard_size": "5GB",
        "overflow": "refuse",
        "allow_nonfinite": False,
        "rounding": "nearest",
        "seed": 0,
    }


def test_a_recipe_without_a_method_serves_inspection() -> None:
    recipe = load_recipe({"vlm": "v", "donor": "d"}, need_method=False)
    assert recipe.method is None and recipe.modules == ("attention", "mlp")
    assert load_recipe(dump_recipe(recipe), need_method=False) == recipe


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (7, 7), ("9b", 9)])
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


def test_every_registered_method_is_a_recipe() -> None:
    for name in METHODS:
        options = {"name": name}
        try:
            recipe = load_recipe(raw(method=options))
        except RecipeError as error:  # a method may require an option, which the message must name
            assert str(error).startswith("method"), name
            continue
        assert type(recipe.method).name == name
        assert load_recipe(dump_recipe(recipe)) == recipe


def test_recipe_errors_answer_without_torch() -> None:
    """Counted in modules, not in seconds: nothing heavy is loaded on the way to a recipe error."""
    code = (
        "import sys\n"
        "from vlmgraft.recipe.model import load_recipe\n"
        "from vlmgraft.errors import RecipeError\n"
        "raw = {'vlm': 'v', 'donor': 'd', 'donor_base': 'b', 'method': {'name': 'task_arithmetic', 'scal': 1}}\n"
        "try: load_recipe(raw)\n"
        "except RecipeError as error: print(error)\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'huggingface_hub') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["method.scal: unknown key; did you mean 'scale'? Valid keys: scale", "[]"]
