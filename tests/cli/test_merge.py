"""The command `merge`: what is refused, with which words, and that nothing is left behind; then what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from broken_inputs import FAULTS, WEIGHTS

from tests.recipe_place import Place

METHODS = ("task_arithmetic", "frism")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_refused_before_anything_is_written(
    fault: str, method: str, trio: Path, tmp_path: Path, vlmgraft: Any
) -> None:
    place = Place(tmp_path, trio, method)
    said = FAULTS[fault](place)
    before = place.files()
    ran = vlmgraft("merge", place.write(), "--out", place.out, "--quiet")
    assert ran.code == 2, ran.err
    assert [part for part in said if part not in ran.err] == [], ran.err
    assert ran.err.startswith("vlmgraft: ") and "Traceback" not in ran.err
    assert place.files() == before


@pytest.mark.parametrize("method", METHODS)
def test_the_same_place_without_a_fault_merges(method: str, trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, method)
    ran = vlmgraft("merge", place.write(), "--out", place.out, "--quiet", "--json")
    assert ran.code == 0, ran.err
    receipt = json.loads(ran.out)
    assert receipt == json.loads((place.out / "receipt.json").read_text())
    assert sum(tensor["verdict"] == "merged" for tensor in receipt["tensors"]) == 4 * 7
    assert [path.name for path in place.out.parent.iterdir()] == ["merged"], "no leftovers beside the output"


@pytest.mark.parametrize(
    ("key", "value", "said"), [("data", "absent.jsonl", "absent.jsonl"), ("samples", 0, "samples")]
)
def test_frism_reads_its_calibration_first(
    key: str, value: Any, said: str, trio: Path, tmp_path: Path, vlmgraft: Any
) -> None:
    place = Place(tmp_path, trio, "frism")
    place.recipe["method"]["calibration"][key] = value
    before = place.files()
    ran = vlmgraft("merge", place.write(), "--out", place.out, "--quiet")
    assert (ran.code, place.files()) == (2, before)
    assert said in ran.err


def test_an_image_that_is_missing_is_named_with_its_line(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "frism")
    (tmp_path / "grey.png").unlink()
    ran = vlmgraft("merge", place.write(), "--out", place.out, "--quiet")
    assert ran.code == 2
    assert "calibration.jsonl, line 1" in ran.err and "grey.png" in ran.err
    assert not list(place.out.parent.iterdir())


@pytest.mark.parametrize("arguments", [[], ["recipe.yaml"], ["absent.yaml", "--out", "merged"]])
def test_missing_arguments_are_input_errors(
    arguments: list[str], trio: Path, tmp_path: Path, vlmgraft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Place(tmp_path, trio, "task_arithmetic").write()
    ran = vlmgraft("merge", *arguments)
    assert ran.code == 2
    assert ran.err.startswith("vlmgraft: ")


def test_schema_is_json_and_refuses_unknown_keys(vlmgraft: Any) -> None:
    schema = json.loads(vlmgraft("merge", "--schema").out)
    assert {"vlm", "donor", "method"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_set_overrides_the_recipe(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    assert vlmgraft("merge", place.write(), "--out", place.out, "--set", "method.scale=0", "--quiet").code == 0
    assert (place.out / WEIGHTS).read_bytes() == (trio / "vlm" / WEIGHTS).read_bytes()
    assert "method.scael" in vlmgraft("merge", place.write(), "--out", tmp_path / "b", "--set", "method.scael=0").err


def test_vlm_and_donor_exchanged_are_told(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    place.recipe |= {"vlm": place.recipe["donor"], "donor": place.recipe["vlm"]}
    ran = vlmgraft("merge", place.write(), "-o", place.out)
    assert ran.code == 2 and "exchange the two" in ran.err


def test_nothing_that_is_written_says_where_files_lie(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    assert vlmgraft("merge", place.write(), "-o", place.out, "-q").code == 0
    for path in place.out.iterdir():
        if path.suffix in (".md", ".json", ".yaml"):
            assert str(tmp_path) not in path.read_text() and str(trio) not in path.read_text(), path.name
    card = yaml.safe_load((place.out / "README.md").read_text().split("---")[1])
    assert card["license"] == "apache-2.0"
    sources = [f"--set={key}={place.recipe[key]}" for key in ("vlm", "donor", "donor_base")]
    again = tmp_path / "again"
    assert "--set vlm=PATH" in vlmgraft("merge", place.out / "recipe.yaml", "-o", again, "-q").err
    assert vlmgraft("merge", place.out / "recipe.yaml", "-o", again, "-q", *sources).code == 0
    assert (again / WEIGHTS).read_bytes() == (place.out / WEIGHTS).read_bytes()
