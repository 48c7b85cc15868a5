"""What recipes of both kinds share: overrides, unreadable files, paths beside the recipe, donors, odd values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sample_method import raw

from vlmgraft.errors import RecipeError
from vlmgraft.recipe.model import load_recipe
from vlmgraft.recipe.source import apply_override, located, naming, refuse_odd_values, several_donors


@pytest.mark.usefixtures("sample")
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


def test_an_override_makes_the_mappings_on_its_way() -> None:
    """A method's bare name becomes a mapping first; what a key held is replaced as YAML says it."""
    recipe: dict[str, Any] = {"method": "ties", "layers": "all"}
    for override in ("method.scale=0.5", "layers=[1, 2]", "output.dtype=float32", "vlm="):
        apply_override(recipe, override)
    assert recipe == {
        "method": {"name": "ties", "scale": 0.5},
        "layers": [1, 2],
        "output": {"dtype": "float32"},
        "vlm": None,
    }


def test_paths_at_any_level_are_made_true_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of keys that hold paths, and only where the file is there."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "q.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    written = {"vlm": "q.jsonl", "method": {"calibration": {"data": "q.jsonl"}, "name": "q.jsonl"}, "gates": ["a/b"]}
    found = located(written, Path("there"))
    assert found == {
        "vlm": "there/q.jsonl",
        "method": {"calibration": {"data": "there/q.jsonl"}, "name": "q.jsonl"},
        "gates": ["a/b"],
    }
    with pytest.raises(
        RecipeError, match=r"method\.calibration\.data: \./gone is neither .* --set method\.calibration"
    ):
        located({"method": {"calibration": {"data": "./gone"}}}, Path("there"))


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({"donor": ["a"], "donor_base": "x"}, {"donor": "a", "donor_base": "x"}),
        ({"donor": "a", "donor_base": "x"}, {"donor": "a", "donor_base": "x"}),
        (
            {"donor": ["a", "b"], "donor_base": ["x", "y"]},
            {"donor": "a", "donor_base": "x", "more_donors": [{"donor": "b", "donor_base": "y"}]},
        ),
        (
            {"donor": ["a", "b", "c"], "donor_base": "x"},
            {
                "donor": "a",
                "donor_base": "x",
                "more_donors": [{"donor": "b", "donor_base": "x"}, {"donor": "c", "donor_base": "x"}],
            },
        ),
    ],
)
def test_lists_of_donors_become_the_first_and_more(given: dict[str, Any], made: dict[str, Any]) -> None:
    several_donors(given)
    assert given == made


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"donor": "a", "donor_base": ["x", "y"]}, "a list of 2 for one donor"),
        ({"donor": ["a", "b"], "donor_base": ["x"]}, "1 models for 2 donors"),
        ({"donor": [], "donor_base": []}, "0 models for 0 donors"),
        ({"donor": ["a"], "donor_base": ["x"], "more_donors": [{"donor": "b"}]}, "not both"),
    ],
)
def test_donors_without_a_base_each_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        several_donors(given)


@pytest.mark.parametrize(
    ("given", "made", "said"),
    [
        ({"scale": float("inf")}, {"scale": float("inf")}, "scale: inf is not a finite number"),
        ({"method": {"scale": [0.5, float("nan")]}}, {"method": {"scale": [0.5, 0.0]}}, r"method\.scale\.1: nan"),
        ({"samples": True}, {"samples": 1}, "samples: true is no number"),
    ],
)
def test_values_that_pass_for_numbers_are_refused(given: dict[str, Any], made: dict[str, Any], said: str) -> None:
    refuse_odd_values({"scale": 0.5, "flag": True}, {"scale": 0.5, "flag": True})
    with pytest.raises(RecipeError, match=said):
        refuse_odd_values(given, made)


def test_an_error_names_the_file_once() -> None:
    for told, said in (("scale: no", "r.yaml: scale: no"), ("r.yaml: no", "r.yaml: no")):
        with pytest.raises(RecipeError) as raised, naming("r.yaml"):
            raise RecipeError(told)
        assert str(raised.value) == said
    with pytest.raises(RecipeError) as raised, naming({"vlm": "v"}):
        raise RecipeError("scale: no")
    assert str(raised.value) == "scale: no"
