"""Recipes: strict keys, overrides, round trips, translation, and an answer without torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from hypothesis import given, strategies as st

from vlmgraft.errors import RecipeError
from vlmgraft.methods import METHODS
from vlmgraft.recipe.model import Recipe, dump_recipe, load_recipe, parse_size
from vlmgraft.recipe.schema import json_schema


@dataclasses.dataclass(frozen=True)
class Questions:
    data: str
    samples: int = 512


@dataclasses.dataclass(frozen=True)
class Sample:
    """A method with every kind of option."""

    scale: float | list[float] | dict[str, float] = 1.0
    rule: Literal["truncate", "star"] = "truncate"
    calibration: Questions | None = None
    name: ClassVar[str] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"donor_base", "vlm_base"})
    default_modules: ClassVar[tuple[str, ...]] = ("all",)


@pytest.fixture(autouse=True)
def sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "sample", Sample)


def raw(**changes: Any) -> dict[str, Any]:
    trio = {"vlm": "v", "donor": "d", "donor_base": "b", "vlm_base": "w"}
    return {**trio, "method": {"name": "sample", "calibration": {"data": "q.jsonl"}}, **changes}


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


@pytest.mark.parametrize("override", ["scale", "=1", "vlm.x=1", "modules=[", "method.nothing=1"])
def test_bad_overrides_are_refused(override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(raw(), [override])


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", None])
def test_unreadable_files_are_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(path)


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


def test_the_schema_lists_every_method_and_its_options() -> None:
    schema = json.loads(json.dumps(json_schema()))
    names = {one["properties"]["name"]["const"]: one for one in schema["properties"]["method"]["oneOf"][1:]}
    assert set(names) == set(METHODS)
    assert set(names["sample"]["properties"]) == {"name", "scale", "rule", "calibration"}
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert "Questions" in schema["$defs"] and schema["additionalProperties"] is False


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


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("vlm: a/b\ndonor: c/d\nmethod:\n  name: linear\n  name: ties\n")
    with pytest.raises(RecipeError, match=r"method\.name stands in lines 4 and 5"):
        load_recipe(path)


def test_relative_paths_are_looked_for_here_then_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here/vlm", "there/vlm", "there/donor"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "there" / "recipe.yaml").write_text("vlm: vlm\ndonor: ./donor\ndonor_base: org/base\nmethod: linear\n")
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe("../there/recipe.yaml", need_method=False)
    assert (recipe.vlm, recipe.donor, recipe.donor_base) == ("vlm", "../there/donor", "org/base")


def test_a_source_that_was_local_elsewhere_asks_for_its_place(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("vlm: ./vlm\ndonor: a/b\nmethod: {name: linear}\n")
    with pytest.raises(RecipeError, match=r"vlm: \./vlm is neither here nor in .*--set vlm=PATH"):
        load_recipe(path)
    assert load_recipe(path, [f"vlm={tmp_path}"]).vlm == str(tmp_path)
