"""Gates in memory: how far directions are open, and the spectrum that they leave."""

from __future__ import annotations

import math

import pytest
import torch

from vlmgraft.errors import CheckpointError
from vlmgraft.spectral.gates import Gates, constant_gates, histogram


def test_the_spectrum_is_scale_times_sigmoid_times_singular_values() -> None:
    gates = Gates({"a": torch.tensor([0.0, math.log(3), -math.inf])}, 2.0)
    assert gates.open("a").tolist() == pytest.approx([0.5, 0.75, 0.0])
    assert gates.spectrum("a", torch.tensor([3.0, 2.0, 1.0])).tolist() == pytest.approx([3.0, 3.0, 0.0])
    with pytest.raises(CheckpointError, match="a: 3 gates for 2 directions"):
        gates.spectrum("a", torch.ones(2))


def test_constant_gates_have_the_shapes_that_are_asked_for() -> None:
    gates = constant_gates({"a": 3, "experts": (2, 4)}, -1.5, 0.7)
    assert gates.scale == 0.7 and gates.logits["experts"].shape == (2, 4)
    assert gates.logits["a"].tolist() == [-1.5, -1.5, -1.5]


def test_the_histogram_counts_shares_in_ten_bins() -> None:
    opened = torch.tensor([0.0, 0.05, 0.15, 0.95, 1.0])
    assert histogram(opened) == [0.4, 0.2, 0, 0, 0, 0, 0, 0, 0, 0.4]
    assert histogram(torch.empty(0)) == [0.0] * 10
