"""Differences are those of the configs, and candidates have their norms."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest

from vlmgraft.alignment import Alignment, align
from vlmgraft.analysis.inspection import Candidate, compare_bases, differences, inspect_weights, name_base
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.recipe.model import load_recipe

Run = Callable[..., Any]


def test_spectra_are_in_the_order_of_the_layers(trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are in the order of a file, in which layer 10 comes before layer 2."""
    layers = [SimpleNamespace(layer=layer) for layer in (0, 10, 2, None)]
    monkeypatch.setattr("vlmgraft.analysis.spectra.measure_spectra", lambda *_: iter(layers))
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    spectra = inspect_weights(load_recipe(places, need_method=False), spectra=True).spectra
    assert [row.layer for row in spectra] == [None, 0, 2, 10]


def test_the_lab_agrees_in_everything(alignment: Alignment) -> None:
    assert differences(alignment) == ()


@pytest.mark.parametrize(
    ("field", "value", "weight"),
    [("rope_theta", 1e6, "harmful"), ("num_key_value_heads", 4, "harmful"), ("vocab_size", 999, "note")],
)
def test_a_config_that_differs_is_named(trio: Path, tmp_path: Path, field: str, value: Any, weight: str) -> None:
    other = copytree(trio / "donor", tmp_path / "donor")
    config = json.loads((other / "config.json").read_text())
    if field == "rope_theta":
        config.pop("rope_parameters", None)
    config[field] = value
    (other / "config.json").write_text(json.dumps(config))
    checkpoints = [open_checkpoint(one) for one in (trio / "vlm", other, trio / "base")]
    found = [one for one in differences(align(*checkpoints)) if one.field == field]
    assert [(one.other, one.theirs, one.weight) for one in found] == [("donor", value, weight)]


def test_the_nearest_base_is_the_donors(trio: Path, alignment: Alignment) -> None:
    """The base against the VLM's own text weights in its place: the donor was tuned from the former."""
    wrong = replace(alignment, donor_base=alignment.donor, tensors=tuple(
        tensor._replace(donor_base=tensor.donor) for tensor in alignment.tensors
    ))  # fmt: skip
    found = compare_bases({"itself": wrong, "base": alignment})
    assert [one.base for one in found] == ["itself", "base"] and found[0].donor_ratio == 0
    assert "not its base" in name_base(found)
    rows = found[1].rows
    total = sum(row.donor_norm**2 for row in rows) / sum(row.weight_norm**2 for row in rows)
    assert found[1].donor_ratio == pytest.approx(total**0.5)


@pytest.mark.parametrize(
    ("ratio", "said"), [(0.4, "was tuned from near: far leaves a task vector 4.0"), (0.12, "not clearly")]
)
def test_how_clear_the_nearest_base_is(ratio: float, said: str) -> None:
    assert said in name_base([Candidate("near", 0.1, 0.1, ()), Candidate("far", ratio, 0.1, ())])
    assert "the only base given" in name_base([Candidate("near", 0.1, 0.1, ())])
