"""Task arithmetic against its formula and PEFT's, and its identities."""

from __future__ import annotations

import pytest
import torch
from fake_merge import Fake, models, run
from peft.utils import merge_utils

from vlmgraft.errors import RecipeError
from vlmgraft.methods.task_arithmetic import TaskArithmetic


@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5])
def test_it_is_the_formula_and_pefts(scale: float) -> None:
    fake = Fake(models())
    for name, merged in run(TaskArithmetic(scale), fake).items():
        vlm, tau = fake.models["vlm"][name], fake.tau()[name]
        torch.testing.assert_close(merged, vlm + scale * tau)
        torch.testing.assert_close(merged, vlm + merge_utils.task_arithmetic([tau], torch.tensor([scale])))


def test_scale_zero_gives_back_the_very_object() -> None:
    fake = Fake(models())
    name = fake.names[0]
    pieces = {key: model[name] for key, model in fake.models.items()}
    assert TaskArithmetic(0.0).apply(pieces, fake.context(name)) is pieces["vlm"]


def test_scales_over_depth_and_by_group() -> None:
    fake = Fake(models())
    depth, group = run(TaskArithmetic([0.0, 1.0]), fake), run(TaskArithmetic({"attention": 0.0, "mlp": 0.5}), fake)
    for name in fake.names:
        vlm, tau, layer = fake.models["vlm"][name], fake.tau()[name], int(name.split(".")[2])
        torch.testing.assert_close(depth[name], vlm + layer / 2 * tau)
        torch.testing.assert_close(group[name], vlm + (0.0 if "attn" in name else 0.5) * tau)


def test_a_scale_that_is_no_number_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"scale: inf must be finite"):
        TaskArithmetic([0.5, float("inf")])
