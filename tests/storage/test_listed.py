"""Where a list is meant, a text or a path is its one entry: in every public function that takes such a list."""

from __future__ import annotations

from pathlib import Path

import pytest

import vlmgraft as vg
from tests.recipe_place import Place
from vlmgraft.analysis import EvalData
from vlmgraft.errors import InputError, RecipeError
from vlmgraft.recipe.tune import load_tune_recipe
from vlmgraft.storage.listed import listed


def test_a_text_or_a_path_is_one_entry() -> None:
    assert listed("ab") == ["ab"] and listed(Path("ab")) == [Path("ab")]
    assert listed(("a", "b")) == listed(iter("ab")) == ["a", "b"] and listed(()) == []


def test_overrides(trio: Path, tmp_path: Path) -> None:
    recipe = Place(tmp_path, trio, "task_arithmetic").recipe
    loaded = vg.load_recipe(recipe, "method.scale=0.25")
    assert loaded.method.scale == 0.25
    with pytest.raises(RecipeError, match=r"^method\.scale=1: a Recipe is validated already"):
        vg.merge(loaded, tmp_path / "out", overrides="method.scale=1")
    tune = {"vlm": "v", "prior": "none", "data": {"train": "t"}}
    assert load_tune_recipe(tune, "data.limit=3").data.limit == 3
    with pytest.raises(RecipeError, match=r"method\.absent: unknown key"):
        one = {**recipe, "method": {"name": "frism", "calibration": {"data": "q.jsonl"}}}
        vg.front(one, tmp_path, tmp_path / "f", [0.1], overrides="method.absent=4")


def test_modules_of_a_prior(trio: Path) -> None:
    one, listed_one = (vg.load_prior(trio / "vlm", trio / "donor", modules=m) for m in ("attention", ["attention"]))
    assert set(one.deltas) == set(listed_one.deltas)
    assert {delta.share for delta in one.deltas.values()} == {1.0}


def test_folders_of_a_report(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for folder in (tmp_path / "run", str(tmp_path / "run")):
        with pytest.raises(InputError, match=r"/run: holds none of the files"):
            vg.write_report(folder, tmp_path / "page.html")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^report: no folder is given"):
        vg.write_report([], tmp_path / "page.html")


def test_grids_rules_and_data_of_analyses(trio: Path, tmp_path: Path) -> None:
    data = EvalData("lab", "sum")  # type: ignore[arg-type]
    assert (data.data, data.reasoning) == (("lab",), ("sum",))
    recipe = Place(tmp_path, trio, "task_arithmetic").recipe
    with pytest.raises(RecipeError, match=r"--grid 'method\.absent=1': no recipe"):
        vg.analysis.sweep({"a": recipe}, "method.absent=1", tmp_path / "sweep")
    with pytest.raises(RecipeError, match="rules: 'absent' is none of"):
        vg.analysis.choose(recipe, tmp_path / "choose", rules="absent")


def test_parts_and_modes_of_a_knockout(trio: Path, tmp_path: Path) -> None:
    options = {"alone": True, "layers": "0", "parts": "attention", "modes": "zero"}
    rows = vg.analysis.knockout(trio / "vlm", tmp_path / "out", EvalData(samples=8), **options)
    assert [(row["part"], row["mode"]) for row in rows if row["layer"] is not None] == [("attention", "zero")]
