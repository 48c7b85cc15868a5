"""The exact threshold of a share of the largest magnitudes, against a sort; passes over the weights, counted."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vlmgraft.methods.base import TensorContext
from vlmgraft.methods.ties import trimmed
from vlmgraft.methods.trim import Tally, find_thresholds, rank_of

magnitudes = st.lists(
    st.floats(-1e3, 1e3, width=32) | st.sampled_from([0.0, 0.5, -0.5, 1e-40, 2.0**-20]), min_size=1, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(magnitudes, st.floats(0.01, 1), st.sampled_from([1, 7, 64]))
def test_the_threshold_is_a_sorts(values: list[float], density: float, chunk: int) -> None:
    """Zeros, equal magnitudes, both signs and denormals included; the k-th largest is found exactly."""
    tau = torch.tensor(values)
    expected = float(tau.abs().sort(descending=True).values[rank_of(density, len(values)) - 1])
    assert threshold_of(tau, density, chunk) == (expected if density < 1 else 0)  # all is kept


@settings(max_examples=150, deadline=None)
@given(magnitudes, st.floats(0.01, 1), st.integers(0, 59), st.integers(1, 59))
def test_a_tally_bears_out_the_sorts_threshold_and_no_other(
    values: list[float], density: float, chosen: int, cut: int
) -> None:
    """Counted in two parts; every magnitude of the list is tried as a threshold."""
    tau = torch.tensor(values)
    expected = float(tau.abs().sort(descending=True).values[rank_of(density, len(values)) - 1])
    guess = float(tau.abs()[chosen % len(values)])
    parts = [Tally.of(trimmed(part.clone(), guess), guess) for part in (tau[:cut], tau[cut:])]
    assert sum(parts, Tally()).bears_out(density) == (guess == expected or density >= 1)


@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_a_sample_that_misleads_costs_passes_and_no_exactness(shift: float) -> None:
    """What is sampled (the first of every 64) is smaller or larger than the rest."""
    tau = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    tau[::64] *= 10**shift
    for density in (0.001, 0.2, 0.9):
        expected = tau.abs().sort(descending=True).values[rank_of(density, len(tau)) - 1]
        seen: list[int] = []
        assert threshold_of(tau, density, 64, seen) == float(expected)
        assert seen[0] == 64 and 2 <= len(seen) <= 4


def test_one_pass_after_the_sample_is_enough_for_weights() -> None:
    tau = 1e-3 * torch.randn(1 << 25, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    threshold_of(tau, 0.2, 1 << 18, seen)
    assert seen == [64, 1]


def threshold_of(tau: torch.Tensor, density: float, chunk: int, seen: list[int] | None = None) -> float:
    """Through passes over chunks of one tensor; `seen` collects the passes' samples."""

    def chunks(function: Any, *, sample: int = 1) -> Iterator[tuple[TensorContext, Any]]:
        if seen is not None:
            seen.append(sample)
        context = TensorContext("w", tuple(tau.shape), 1)
        for part in tau.split(chunk):
            yield context, function({"tau": part[: -(-len(part) // sample)].clone()}, context)

    passes: Any = SimpleNamespace(map=chunks)
    return find_thresholds(passes, dict, lambda context: "", lambda source, context: density)[""]["tau"]
