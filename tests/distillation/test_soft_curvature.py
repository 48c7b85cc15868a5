"""Soft curvature gates: the minimum they are said to be, and a budget that they meet."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from vlmgraft.distillation.curvature import FisherDiagonal, curvature_gates, estimate_curvature
from vlmgraft.distillation.distill import Distiller

positive = st.floats(1e-3, 1e3)


def one_matrix(s: list[float]) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(s)}


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=5), positive, positive)
def test_soft_gates_minimise_kl_and_the_distance_to_the_task_vector(
    directions: list[tuple[float, float]], cut: float, scale: float
) -> None:
    """½ λ² c² h + α (1 − c)² s² with cut = 2α/λ²: its derivative is zero at the gates."""
    h = torch.tensor([h for h, _ in directions], dtype=torch.float64)
    s = torch.tensor([s for _, s in directions], dtype=torch.float64)
    gates = FisherDiagonal({"w": h.float()}, 1).cut(one_matrix([s for _, s in directions]), scale, cut, soft=True)
    c = gates.open("w").double()
    alpha = cut * scale**2 / 2
    down, up = scale**2 * c * h, 2 * alpha * (1 - c) * s.square()
    assert torch.allclose(down, up, rtol=1e-3, atol=1e-5 * float((scale**2 * h + 2 * alpha * s.square()).max()))


def test_empty_and_free_directions_have_finite_meaning() -> None:
    gates = FisherDiagonal({"w": torch.tensor([1.0, 0.0])}, 1).cut(one_matrix([0.0, 2.0]), 1.0, 1.0, soft=True)
    assert gates.open("w").tolist() == [0.0, 1.0]


def test_soft_gates_meet_a_measured_budget_from_below(distiller: Distiller) -> None:
    curvature = estimate_curvature(distiller)
    whole = distiller.keep_kl(curvature.cut({name: one.s for name, one in distiller.factors.items()}, 1.0, 1e9))
    for share in (0.1, 0.5):
        gates = curvature_gates(distiller, 1.0, share * whole, curvature=curvature, soft=True)
        assert distiller.keep_kl(gates) == pytest.approx(gates.settings["held_out_kl"], rel=1e-3)
        assert 0.9 * share * whole < gates.settings["held_out_kl"] <= share * whole
        opened = torch.cat([gates.open(name) for name in gates.logits])
        assert float(((opened > 0.01) & (opened < 0.99)).float().mean()) > 0.2, "soft"
