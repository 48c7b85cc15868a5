"""The recipe that `init` writes is one that loads, whatever the names, and its calibration fits the file."""

from __future__ import annotations

import pytest
import yaml

from vlmgraft.methods.frism import Frism
from vlmgraft.methods.task_arithmetic import TaskArithmetic
from vlmgraft.recipe.model import load_recipe
from vlmgraft.recipe.template import recipe_template, shares


@pytest.mark.parametrize(
    ("questions", "learned", "measured"), [(1, 1, 0), (2, 2, 0), (9, 6, 3), (639, 511, 128), (640, 512, 128)]
)
def test_a_third_is_measured_on_and_at_most_128(questions: int, learned: int, measured: int) -> None:
    assert shares(questions) == (learned, measured)


@pytest.mark.parametrize("name", ["org/name@main", "yes", "a: b", "# c", "3", "[d]", "é \"f\" 'g'", "null"])
def test_names_of_any_kind_come_back_as_they_were(name: str) -> None:
    recipe = load_recipe(yaml.safe_load(recipe_template(name, f"{name} donor", f"{name} base", f"{name}.jsonl", 30)))
    assert (recipe.vlm, recipe.donor, recipe.donor_base) == (name, f"{name} donor", f"{name} base")
    assert isinstance(recipe.method, Frism) and recipe.method.kl_budget == 0.01
    calibration = recipe.method.calibration
    assert calibration is not None
    assert (calibration.data, calibration.samples, calibration.held_out) == (f"{name}.jsonl", 20, 10)


def test_without_data_it_is_task_arithmetic_and_shows_where_frism_begins() -> None:
    text = recipe_template(None, None, "org/base")
    recipe = load_recipe(yaml.safe_load(text))
    assert (recipe.vlm, recipe.donor) == ("organisation/vlm", "organisation/donor")
    assert recipe.method == TaskArithmetic(0.2) and recipe.modules == ("attention", "mlp")
    shown = "\n".join(line[2:] for line in text.splitlines() if line.startswith(("# method:", "#   ")))
    assert yaml.safe_load(shown)["method"]["name"] == "frism"


def test_a_base_that_is_not_known_is_a_comment() -> None:
    text = recipe_template("a/b", "c/d", None)
    assert "\n# donor_base: organisation/name\n" in text and "donor_base" not in yaml.safe_load(text)
