"""Curvature gates: the estimate against plain autograd, budgets, and a model that is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmgraft.errors import RecipeError
from vlmgraft.training import curvature as module
from vlmgraft.training import direction_scores
from vlmgraft.training.curvature import Curvature, curvature_gates, estimate_curvature
from vlmgraft.training.distill import Distiller


@pytest.fixture(scope="module")
def curvature(distiller: Distiller) -> Curvature:
    return estimate_curvature(distiller, draws=2)


def likeliest(log_p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return log_p.argmin(-1)  # unlikely tokens: their gradients are large


def test_the_estimate_is_the_squared_gradient_of_every_question(
    distiller: Distiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: the gradient of one question's loss at a time with respect to a spectrum at zero."""
    monkeypatch.setattr(direction_scores, "draw_tokens", likeliest)
    few = Distiller(distiller.model, distiller.processor, distiller.factors, distiller.questions[:3], max_new_tokens=4)
    found = estimate_curvature(few)
    monkeypatch.setattr(module, "tapped_scores", direction_scores.question_gradients)
    twin = estimate_curvature(few)
    assert found.tokens == twin.tokens == sum(int(batch.predicts.sum()) for batch in few.targets.batches)
    for name, expected in twin.h.items():
        assert torch.allclose(found.h[name], expected, rtol=1e-2, atol=1e-4 * float(expected.max()))


def test_a_larger_budget_opens_more_and_prediction_is_kept(distiller: Distiller, curvature: Curvature) -> None:
    found = [curvature.gates(distiller.factors, 1.0, budget) for budget in (1e-5, 1e-3, 1e9)]
    energies = [gates.settings["energy"] for gates in found]
    assert 0 <= energies[0] < energies[1] < energies[2] == pytest.approx(1, abs=1e-4)
    assert all(gates.settings["predicted_kl"] <= budget for gates, budget in zip(found, (1e-5, 1e-3, 1e9), strict=True))
    assert all(bool(logits.isinf().all()) for logits in found[1].logits.values())


def test_prediction_is_of_the_size_of_the_drift(distiller: Distiller, curvature: Curvature) -> None:
    """Open everything a little: the second-order prediction and the measured drift agree within a factor of three."""
    scale = 0.3
    gates = curvature.gates(distiller.factors, scale, 1e9)
    measured = distiller.keep_kl(gates, distiller.targets)
    assert 1 / 3 < gates.settings["predicted_kl"] / measured < 3


def test_the_measured_budget_is_kept_and_order_beats_chance(distiller: Distiller, curvature: Curvature) -> None:
    budget = 0.3 * distiller.keep_kl(curvature.gates(distiller.factors, 1.0, 1e9))
    gates = curvature_gates(distiller, 1.0, budget, curvature=curvature)
    assert distiller.keep_kl(gates) == pytest.approx(gates.settings["held_out_kl"], rel=1e-3)
    assert 0.5 * budget < gates.settings["held_out_kl"] <= budget
    shuffled = {name: h[torch.randperm(len(h), generator=torch.Generator().manual_seed(0))]
                for name, h in curvature.h.items()}  # fmt: skip
    chance = curvature_gates(distiller, 1.0, budget, curvature=Curvature(shuffled, curvature.tokens))
    assert gates.settings["energy"] > chance.settings["energy"]


def test_the_model_is_left_as_it_was(distiller: Distiller, vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [parameter.requires_grad for parameter in vlm.parameters()]

    def fail(*args: object) -> torch.Tensor:
        raise RuntimeError("stopped")

    monkeypatch.setattr(direction_scores, "draw_tokens", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        estimate_curvature(distiller)
    assert [parameter.requires_grad for parameter in vlm.parameters()] == flags
    assert not any(child._forward_hooks for child in vlm.modules())
    assert all(parameter.grad is None for parameter in vlm.parameters())


def test_a_zero_budget_is_refused(distiller: Distiller, curvature: Curvature) -> None:
    with pytest.raises(RecipeError, match="kl_budget"):
        curvature.gates(distiller.factors, 1.0, 0.0)
