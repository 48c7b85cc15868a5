"""The recipe of curvature gates."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from vlmgraft.errors import RecipeError
from vlmgraft.methods.curvature import Curvature


def test_the_recipe_validates() -> None:
    found = TypeAdapter(Curvature).validate_python({"kl_budget": 0.02, "rank": 64, "calibration": {"data": "q.jsonl"}})
    assert (found.kl_budget, found.rank, found.scale, found.calibration.data) == (0.02, 64, 1.0, "q.jsonl")


@pytest.mark.parametrize("options", [{"kl_budget": 0.0}, {"draws": 0}])
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        Curvature(**options)
