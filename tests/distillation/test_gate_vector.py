"""The vector of gates: which logit each direction reads, and the spectra and energy that it gives."""

from __future__ import annotations

import math

import pytest
import torch

from vlmgraft.distillation.gate_vector import EXTREME, GateVector
from vlmgraft.errors import RecipeError
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gates import Gates

NAMES = ("model.layers.0.a.weight", "model.layers.0.b.weight", "model.layers.1.a.weight", "head.weight")
SPECTRA = ([3.0, 1.0], [2.0], [1.0, 0.5, 0.25], [4.0])


def table() -> dict[str, Factors]:
    return {
        name: Factors(name, name, torch.eye(len(s)), torch.tensor(s), torch.eye(len(s)), sum(x * x for x in s), 0.0)
        for name, s in zip(NAMES, SPECTRA, strict=True)
    }


def test_spectra_and_energy_are_those_of_the_formula() -> None:
    start = Gates({name: torch.full((len(s),), math.log(3)) for name, s in zip(NAMES, SPECTRA, strict=True)}, 1.0)
    vector = GateVector(table(), "direction", start)
    spectra, energy = vector.spectra(2.0)
    assert spectra[NAMES[0]].tolist() == pytest.approx([2 * 0.75 * 3, 2 * 0.75 * 1])
    assert energy.item() == pytest.approx(0.75**2)
    logits = torch.tensor([math.log(3), -math.inf, 0.0, 0.0, 0.0, 0.0, -math.inf])
    with torch.no_grad():
        vector.logits.copy_(logits)
    whole = 9 + 1 + 4 + 1 + 0.25 + 0.0625 + 16
    expected = 0.75**2 * 9 + 0.25 * (4 + 1 + 0.25 + 0.0625)
    assert vector.spectra(5.0)[1].item() == pytest.approx(expected / whole), "the scale plays no part"


@pytest.mark.parametrize(
    ("granularity", "readers"),
    [
        ("direction", [0, 1, 2, 3, 4, 5, 6]),
        ("matrix", [0, 0, 1, 2, 2, 2, 3]),
        ("layer", [0, 0, 0, 1, 1, 1, 2]),  # what is in no layer has one of its own
    ],
)
def test_directions_share_a_logit_by_matrix_or_layer(granularity: str, readers: list[int]) -> None:
    vector = GateVector(table(), granularity)  # type: ignore[arg-type]
    assert len(vector.logits) == max(readers) + 1
    with torch.no_grad():
        vector.logits.copy_(torch.arange(len(vector.logits)).float())
    assert vector.expanded().tolist() == readers
    assert [len(part) for part in vector.frozen().values()] == [2, 1, 3, 1]
    assert torch.cat([*vector.frozen().values()]).tolist() == readers


def test_shared_logits_start_at_the_mean_of_what_they_replace() -> None:
    logits = {name: torch.arange(len(s)).float() for name, s in zip(NAMES, SPECTRA, strict=True)}
    vector = GateVector(table(), "matrix", Gates(logits, 1.0))
    assert vector.logits.tolist() == [0.5, 0.0, 1.0, 0.0]


def test_infinite_logits_start_where_training_is_finite() -> None:
    for logit in (math.inf, -math.inf):
        vector = GateVector(table(), "direction", logit)
        assert vector.logits.tolist() == [math.copysign(EXTREME, logit)] * 7
    assert float(torch.tensor(EXTREME).sigmoid()) > 1 - 1e-6


def test_frozen_logits_are_copies() -> None:
    vector = GateVector(table())
    frozen = vector.frozen()
    with torch.no_grad():
        vector.logits += 1
    assert all(bool((part == 0).all()) for part in frozen.values())


def test_experts_have_a_logit_per_expert_and_direction() -> None:
    s = torch.tensor([[2.0, 1.0], [3.0, 0.5]])
    experts = Factors("e", "e", torch.ones(2, 3, 2), s, torch.ones(2, 2, 3), float(s.square().sum()), 0.0)
    vector = GateVector({"e": experts})
    assert vector.spectra(1.0)[0]["e"].equal(0.5 * s) and vector.frozen()["e"].shape == (2, 2)


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(RecipeError, match="granularity: 'head' is none of direction, matrix, layer"):
        GateVector(table(), "head")  # type: ignore[arg-type]
