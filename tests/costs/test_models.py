"""Sizes of models as the tables count them, against counts by hand and by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmgraft.costs.models import MODELS, Model, kept
from vlmgraft.distillation.memory import Shapes
from vlmgraft.hf.models import load_config, load_vlm

SHAPES = Shapes(3, 1000, 500, (("q_proj", 8, 6), ("k_proj", 2, 6), ("down_proj", 6, 20)), 6, 2, 50, ((4, 10, 6),), 2)
MODEL = Model("made up", SHAPES, 2, 70)


def test_counts_of_a_model_made_up() -> None:
    """Per layer: 48 + 12 + 120 elements of plain matrices and four experts of 60, two of which a token meets."""
    assert MODEL.parameters == 3 * 1000 + 500
    assert MODEL.matrices == [(3, 8, 6), (3, 2, 6), (3, 6, 20), (12, 10, 6)]
    assert MODEL.merged == 3 * (180 + 4 * 60)
    assert MODEL.active == 3 * (180 + 2 * 60)
    assert MODEL.directions("full") == 3 * (6 + 2 + 6) + 12 * 6
    assert MODEL.directions(4) == 3 * (4 + 2 + 4) + 12 * 4
    assert MODEL.factors(4) == 3 * (4 * 14 + 2 * 8 + 4 * 26) + 12 * 4 * 16


@pytest.mark.parametrize(("rank", "count"), [("full", 6), (4, 4), (6, 6), (99, 6)])
def test_a_decomposition_keeps_what_there_is_at_most(rank: int | str, count: int) -> None:
    assert kept(6, 20, rank) == kept(20, 6, rank) == count  # type: ignore[arg-type]


def test_a_model_is_counted_from_its_config(trio: Path) -> None:
    """The lab's VLM: every parameter, those of the tower by name, and keys of two heads of 32."""
    model = Model.of("lab", load_config(trio / "vlm"))
    parameters = dict(load_vlm(trio / "vlm").named_parameters())
    assert model.parameters == sum(parameter.numel() for parameter in parameters.values())
    assert model.tower == sum(parameter.numel() for name, parameter in parameters.items() if ".visual." in name)
    assert model.keys == 64 and model.shapes.layers == 4
    assert model.merged == model.active == 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)


def test_the_tables_models_are_in_order_of_size_but_for_the_mixture() -> None:
    dense = [model.parameters for model in MODELS if not model.shapes.experts]
    assert dense == sorted(dense) and len(dense) == len(MODELS) - 1
    mixture = MODELS[-1]
    assert mixture.active < mixture.merged / 10
