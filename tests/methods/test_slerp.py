"""Spherical interpolation in float64, by hand, and where it is a mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fake_merge import SHAPES, Fake, models, run

from vlmgraft.errors import RecipeError
from vlmgraft.methods.slerp import Slerp, great_circle_weights


@pytest.mark.parametrize("t", [0.1, 0.5, 1.0])
def test_it_is_the_formula_on_every_matrix_and_every_expert(t: float) -> None:
    fake = Fake(models(shapes={**SHAPES, "model.norm.weight": (7,)}))
    merged = run(Slerp(t), fake)
    for name, vlm in fake.models["vlm"].items():
        stacks = [(one if one.ndim == 3 else one[None]).double().numpy() for one in (vlm, fake.models["donor"][name])]
        parts = []
        for a, b in zip(*stacks, strict=True):
            angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
            assert angle > 0.05  # no mean
            parts.append((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle))
        torch.testing.assert_close(merged[name], torch.from_numpy(np.stack(parts)).reshape(vlm.shape).float())


def test_by_hand() -> None:
    """At a right angle, halfway, both factors are √½; at 60°, a third of the way, sin 40° and sin 20° over sin 60°."""
    x, y = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])
    assert great_circle_weights(x, y, 0.5) == pytest.approx((0.5**0.5, 0.5**0.5))
    third = great_circle_weights(x, torch.tensor([1.0, 3**0.5]), 1 / 3)
    degrees = np.sin(np.deg2rad([40.0, 20.0, 60.0]))
    assert third == pytest.approx((degrees[0] / degrees[2], degrees[1] / degrees[2]))


@pytest.mark.parametrize("donor", [[2.0, 0.02], [-1.0, 0.0], [0.0, 0.0]])
def test_collinear_tensors_and_zeros_are_averaged(donor: list[float]) -> None:
    assert great_circle_weights(torch.tensor([1.0, 0.0]), torch.tensor(donor), 0.25) == (0.75, 0.25)


def test_a_little_more_than_the_least_angle_is_no_mean() -> None:
    cosine = 0.9994
    b = torch.tensor([cosine, (1 - cosine**2) ** 0.5])
    assert great_circle_weights(torch.tensor([1.0, 0.0]), b, 0.25) != (0.75, 0.25)


def test_zero_is_the_vlm_bit_for_bit_and_one_the_donor() -> None:
    fake = Fake(models())
    assert all(merged.equal(fake.models["vlm"][name]) for name, merged in run(Slerp(0.0), fake).items())
    for name, merged in run(Slerp(1.0), fake).items():
        torch.testing.assert_close(merged, fake.models["donor"][name])


@pytest.mark.parametrize("options", [{"t": 1.5}, {"t": [0.0, -1.0]}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="t"):
        Slerp(**options)
