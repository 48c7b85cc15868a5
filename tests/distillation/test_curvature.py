"""Curvature gates: the estimate against plain autograd, budgets, and a model that is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmgraft.distillation import curvature as module
from vlmgraft.distillation import fisher
from vlmgraft.distillation.curvature import FisherDiagonal, curvature_gates, estimate_curvature
from vlmgraft.distillation.distill import Distiller
from vlmgraft.errors import RecipeError
from vlmgraft.spectral.factors import Factors


@pytest.fixture(scope="module")
def curvature(distiller: Distiller) -> FisherDiagonal:
    return estimate_curvature(distiller, draws=2)


def likeliest(log_p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return log_p.argmin(-1)  # unlikely tokens: their gradients are large


def test_the_estimate_is_the_squared_gradient_of_every_question(
    distiller: Distiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: the gradient of one question's loss at a time with respect to a spectrum at zero."""
    monkeypatch.setattr(fisher, "draw_tokens", likeliest)
    few = Distiller(distiller.model, distiller.processor, distiller.factors, distiller.questions[:3], max_new_tokens=4)
    found = estimate_curvature(few)
    monkeypatch.setattr(module, "tapped_scores", fisher.question_gradients)
    twin = estimate_curvature(few)
    assert found.tokens == twin.tokens == sum(int(batch.predicts.sum()) for batch in few.targets.batches)
    for name, expected in twin.h.items():
        assert torch.allclose(found.h[name], expected, rtol=1e-2, atol=1e-4 * float(expected.max()))


def by_hand() -> tuple[FisherDiagonal, dict[str, Factors]]:
    """h/s² is 1, 4, 9 in "a" and 1/2 in "b", whose s is 2; "b" also has a direction without energy."""
    h = {"a": torch.tensor([1.0, 4.0, 9.0]), "b": torch.tensor([2.0, 0.0])}
    s = {"a": torch.ones(3), "b": torch.tensor([2.0, 0.0])}
    parts = {name: (torch.eye(4)[:, : len(row)], row, torch.eye(len(row))) for name, row in s.items()}
    return FisherDiagonal(h, 7), {name: Factors(name, name, *part, 0.0, 0.0) for name, part in parts.items()}


@pytest.mark.parametrize(
    ("scale", "budget", "opened", "predicted"),
    [(1.0, 1.6, ([1, 0, 0], [1, 0]), 1.5), (2.0, 6.0, ([1, 0, 0], [1, 0]), 6.0), (1.0, 0.9, ([0, 0, 0], [0, 0]), 0.0)],
)
def test_directions_open_in_the_order_of_h_per_energy(
    scale: float, budget: float, opened: tuple[list[int], list[int]], predicted: float
) -> None:
    """½λ²h summed in that order: 1, 1.5, 3.5 and 8 at λ = 1."""
    fisher, factors = by_hand()
    gates = fisher.gates(factors, scale, budget)
    assert (gates.open("a").tolist(), gates.open("b").tolist()) == opened
    assert gates.settings["predicted_kl"] == pytest.approx(predicted) and gates.scale == scale
    assert gates.settings["energy"] == pytest.approx((opened[0][0] + 4 * opened[1][0]) / 7)


def test_soft_gates_are_the_minimum_of_kl_and_distance() -> None:
    """c = 1/(1 + (h/s²)/cut); a direction without energy stays closed."""
    gates = (pair := by_hand())[0].cut(pair[1], 1.0, 4.0, soft=True)
    assert gates.open("a").tolist() == pytest.approx([1 / (1 + t / 4) for t in (1, 4, 9)])
    assert gates.open("b").tolist() == pytest.approx([1 / (1 + 0.5 / 4), 0.0])


def test_cuts_are_where_a_direction_opens_or_a_fine_grid_around_all() -> None:
    assert module._cuts(*by_hand(), False).tolist() == [0.5, 1, 4, 9]
    grid = module._cuts(*by_hand(), True)
    assert len(grid) == 2**14 - 1
    assert float(grid[0]) == pytest.approx(0.5e-3, rel=1e-4) and float(grid[-1]) == pytest.approx(9e3, rel=1e-4)


def test_a_larger_budget_opens_more_and_prediction_is_kept(distiller: Distiller, curvature: FisherDiagonal) -> None:
    found = [curvature.gates(distiller.factors, 1.0, budget) for budget in (1e-5, 1e-3, 1e9)]
    energies = [gates.settings["energy"] for gates in found]
    assert 0 <= energies[0] < energies[1] < energies[2] == pytest.approx(1, abs=1e-4)
    assert all(gates.settings["predicted_kl"] <= budget for gates, budget in zip(found, (1e-5, 1e-3, 1e9), strict=True))
    assert all(bool(logits.isinf().all()) for logits in found[1].logits.values())


def test_prediction_is_of_the_size_of_the_drift(distiller: Distiller, curvature: FisherDiagonal) -> None:
    """Open everything a little: the second-order prediction and the measured drift agree within a factor of three."""
    scale = 0.3
    gates = curvature.gates(distiller.factors, scale, 1e9)
    measured = distiller.keep_kl(gates, distiller.targets)
    assert 1 / 3 < gates.settings["predicted_kl"] / measured < 3


def test_the_measured_budget_is_kept_and_order_beats_chance(distiller: Distiller, curvature: FisherDiagonal) -> None:
    budget = 0.3 * distiller.keep_kl(curvature.gates(distiller.factors, 1.0, 1e9))
    gates = curvature_gates(distiller, 1.0, budget, curvature=curvature)
    assert distiller.keep_kl(gates) == pytest.approx(gates.settings["held_out_kl"], rel=1e-3)
    assert 0.5 * budget < gates.settings["held_out_kl"] <= budget
    shuffled = {name: h[torch.randperm(len(h), generator=torch.Generator().manual_seed(0))]
                for name, h in curvature.h.items()}  # fmt: skip
    chance = curvature_gates(distiller, 1.0, budget, curvature=FisherDiagonal(shuffled, curvature.tokens))
    assert gates.settings["energy"] > chance.settings["energy"]


def test_the_model_is_left_as_it_was(distiller: Distiller, vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [parameter.requires_grad for parameter in vlm.parameters()]

    def fail(*args: object) -> torch.Tensor:
        raise RuntimeError("stopped")

    monkeypatch.setattr(fisher, "draw_tokens", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        estimate_curvature(distiller)
    assert [parameter.requires_grad for parameter in vlm.parameters()] == flags
    assert not any(child._forward_hooks for child in vlm.modules())
    assert all(parameter.grad is None for parameter in vlm.parameters())


def test_a_zero_budget_is_refused(distiller: Distiller, curvature: FisherDiagonal) -> None:
    with pytest.raises(RecipeError, match="kl_budget"):
        curvature.gates(distiller.factors, 1.0, 0.0)
