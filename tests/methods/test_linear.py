"""The weighted mean against its formula and against PEFT's sum of models."""

from __future__ import annotations

import pytest
import torch
from fake_merge import Fake, models, run
from peft.utils import merge_utils

from vlmgraft.errors import RecipeError
from vlmgraft.methods.linear import Linear


@pytest.mark.parametrize("weight", [0.9, 0.3, 0.0])
def test_it_is_the_formula_and_pefts(weight: float) -> None:
    fake = Fake(models())
    for name, merged in run(Linear(weight), fake).items():
        vlm, donor = fake.models["vlm"][name], fake.models["donor"][name]
        torch.testing.assert_close(merged, weight * vlm + (1 - weight) * donor)
        torch.testing.assert_close(
            merged, merge_utils.task_arithmetic([vlm, donor], torch.tensor([weight, 1 - weight]))
        )


def test_all_weight_on_the_vlm_is_the_vlm_and_none_is_the_donor() -> None:
    fake = Fake(models())
    assert all(one.equal(fake.models["vlm"][name]) for name, one in run(Linear(1.0), fake).items())
    assert all(one.equal(fake.models["donor"][name]) for name, one in run(Linear(0.0), fake).items())


def test_weights_over_depth_and_by_group() -> None:
    fake = Fake(models())
    depth, group = run(Linear([1.0, 0.0]), fake), run(Linear({"attention": 1.0, "mlp": 0.0}), fake)
    for name in fake.names:
        share = (1.0, 0.5, 0.0)[int(name.split(".")[2])]
        vlm, donor = fake.models["vlm"][name], fake.models["donor"][name]
        torch.testing.assert_close(depth[name], share * vlm + (1 - share) * donor)
        assert group[name].equal(vlm if "attn" in name else donor)


def test_a_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(RecipeError, match="vlm_weight"):
        Linear(float("nan"))
