"""Curvature gates: scores by hand, the estimate against plain autograd, budgets, and a model that is left alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from vlmgraft.distillation import curvature as module, gated_layers
from vlmgraft.distillation.curvature import (
    FisherDiagonal,
    curvature_gates,
    draw_tokens,
    estimate_curvature,
    question_scores,
    tapped_scores,
)
from vlmgraft.distillation.distill import Distiller
from vlmgraft.errors import RecipeError
from vlmgraft.hf.modules import text_model
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gates import Gates


@pytest.fixture(scope="module")
def curvature(distiller: Distiller) -> FisherDiagonal:
    return estimate_curvature(distiller, draws=2)


def likeliest(log_p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return log_p.argmin(-1)  # unlikely tokens: their gradients are large


def test_the_estimate_is_the_squared_gradient_of_every_question(
    distiller: Distiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: the gradient of one question's loss at a time with respect to a spectrum at zero."""
    monkeypatch.setattr(module, "draw_tokens", likeliest)
    few = Distiller(distiller.model, distiller.processor, distiller.factors, distiller.questions[:3], max_new_tokens=4)
    found = estimate_curvature(few)
    monkeypatch.setattr(module, "tapped_scores", module.question_gradients)
    twin = estimate_curvature(few)
    assert found.tokens == twin.tokens == sum(int(batch.predicts.sum()) for batch in few.targets.batches)
    for name, expected in twin.h.items():
        assert torch.allclose(found.h[name], expected, rtol=1e-2, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize("of_model", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_factors", [torch.float32, torch.bfloat16])
def test_factors_are_put_in_place_once_and_none_is_rounded(
    distiller: Distiller, of_model: torch.dtype, of_factors: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """U and Vh go to the layers once for 2 × 3 batches; the scores are those of the factors as they were given, also
    where they are finer than the model, whose layers round them."""
    factors = {name: matrix.to(dtype=of_factors) for name, matrix in distiller.factors.items()}
    placed, used = list[torch.Tensor](), dict[str, set[int]]()
    freeze, real = gated_layers._frozen, module.question_scores

    def frozen(factor: torch.Tensor, like: torch.Tensor) -> Any:
        placed.append(freeze(factor, like))
        return placed[-1]

    def scores(x: torch.Tensor, delta: torch.Tensor, U: torch.Tensor, s: torch.Tensor, Vh: torch.Tensor) -> Any:
        (given,) = (matrix for matrix in factors.values() if matrix.s.equal(s))
        used.setdefault(given.name, set()).update((U.data_ptr(), Vh.data_ptr()))
        twin = (x.float() @ given.Vh.float().mT) * (delta.float() @ given.U.float())
        found = real(x, delta, U, s, Vh)
        assert found.equal(twin.sum(1) * given.s)
        return found

    model = copy.deepcopy(distiller.model).to(of_model)
    few = Distiller(model, distiller.processor, factors, distiller.questions[:6], max_new_tokens=4, batch_size=2)
    monkeypatch.setattr(gated_layers, "_frozen", frozen)
    monkeypatch.setattr(module, "question_scores", scores)
    estimate_curvature(few, draws=2)
    assert len(few.targets.batches) >= 3 and len(placed) == 2 * len(factors) == 2 * len(used)
    if (of_model, of_factors) != (torch.bfloat16, torch.float32):
        assert set[int]().union(*used.values()) == {matrix.data_ptr() for matrix in placed}, "no copy of them is made"


@pytest.mark.parametrize("scores", ["tapped_scores", "question_gradients"])
def test_checkpointed_layers_give_the_same_bits(
    distiller: Distiller, monkeypatch: pytest.MonkeyPatch, scores: str
) -> None:
    """And run twice, once forward and once in the backward pass; what is tapped is read in the second run."""
    monkeypatch.setattr(module, "tapped_scores", getattr(module, scores))
    few = Distiller(distiller.model, distiller.processor, distiller.factors, distiller.questions[:3], max_new_tokens=4)
    plain, runs = estimate_curvature(few), []
    layer = text_model(few.model).layers[0]
    hook = layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        twin = estimate_curvature(few, checkpointing=True)
    finally:
        hook.remove()
    assert all(torch.equal(twin.h[name], h) for name, h in plain.h.items())
    assert len(runs) >= 2 * len(few.targets.batches)
    assert "forward" not in vars(layer)


def predicted_gates(fisher: FisherDiagonal, factors: Mapping[str, Factors], scale: float, budget: float) -> Gates:
    """Hard gates whose KL, as the diagonal predicts it (`predicted_kl`), is the largest one within the budget."""
    thresholds = fisher.thresholds(spectra(factors))
    ascending, index = torch.cat([value.flatten() for value in thresholds.values()]).sort(stable=True)
    kl = 0.5 * scale**2 * torch.cat([h.flatten() for h in fisher.h.values()]).double()[index].cumsum(0)
    count = int((kl <= budget).sum())
    cut, predicted = (float(ascending[count - 1]), float(kl[count - 1])) if count else (-1.0, 0.0)
    return fisher.cut(spectra(factors), scale, cut, {"predicted_kl": predicted})


def spectra(factors: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    return {name: matrix.s for name, matrix in factors.items()}


def by_hand() -> tuple[FisherDiagonal, dict[str, torch.Tensor]]:
    """h/s² is 1, 4, 9 in "a" and 1/2 in "b", whose s is 2; "b" also has a direction without energy."""
    h = {"a": torch.tensor([1.0, 4.0, 9.0]), "b": torch.tensor([2.0, 0.0])}
    return FisherDiagonal(h, 7), {"a": torch.ones(3), "b": torch.tensor([2.0, 0.0])}


@pytest.mark.parametrize(
    ("scale", "budget", "opened", "predicted"),
    [(1.0, 1.6, ([1, 0, 0], [1, 0]), 1.5), (2.0, 6.0, ([1, 0, 0], [1, 0]), 6.0), (1.0, 0.9, ([0, 0, 0], [0, 0]), 0.0)],
)
def test_directions_open_in_the_order_of_h_per_energy(
    scale: float, budget: float, opened: tuple[list[int], list[int]], predicted: float
) -> None:
    """½λ²h summed in that order: 1, 1.5, 3.5 and 8 at λ = 1."""
    fisher, s = by_hand()
    factors = {name: Factors(name, name, torch.eye(4)[:, : len(row)], row, torch.eye(len(row)), 0.0, 0.0)
               for name, row in s.items()}  # fmt: skip
    gates = predicted_gates(fisher, factors, scale, budget)
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
    found = [predicted_gates(curvature, distiller.factors, 1.0, budget) for budget in (1e-5, 1e-3, 1e9)]
    energies = [gates.settings["energy"] for gates in found]
    assert 0 <= energies[0] < energies[1] < energies[2] == pytest.approx(1, abs=1e-4)
    assert all(gates.settings["predicted_kl"] <= budget for gates, budget in zip(found, (1e-5, 1e-3, 1e9), strict=True))
    assert all(bool(logits.isinf().all()) for logits in found[1].logits.values())


def test_prediction_is_of_the_size_of_the_kl(distiller: Distiller, curvature: FisherDiagonal) -> None:
    """Open everything a little: the second-order prediction and the measured KL agree within a factor of three."""
    scale = 0.3
    gates = predicted_gates(curvature, distiller.factors, scale, 1e9)
    measured = distiller.keep_kl(gates, distiller.targets)
    assert 1 / 3 < gates.settings["predicted_kl"] / measured < 3


def test_the_measured_budget_is_kept_and_order_beats_chance(distiller: Distiller, curvature: FisherDiagonal) -> None:
    budget = 0.3 * distiller.keep_kl(predicted_gates(curvature, distiller.factors, 1.0, 1e9))
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

    monkeypatch.setattr(module, "draw_tokens", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        estimate_curvature(distiller)
    assert [parameter.requires_grad for parameter in vlm.parameters()] == flags
    assert not any(child._forward_hooks for child in vlm.modules())
    assert all(parameter.grad is None for parameter in vlm.parameters())


def test_a_zero_budget_is_refused(distiller: Distiller, curvature: FisherDiagonal) -> None:
    with pytest.raises(RecipeError, match="kl_budget"):
        curvature_gates(distiller, 1.0, 0.0, curvature=curvature)


def test_a_score_is_the_sum_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    x, delta, U, s, Vh = (
        torch.randn(*shape, generator=generator) for shape in ((2, 3, 4), (2, 3, 5), (5, 2), (2,), (2, 4))
    )
    scores = question_scores(x, delta, U, s, Vh)
    for question in range(2):
        for i in range(2):
            expected = sum(
                float(delta[question, t] @ U[:, i]) * float(x[question, t] @ Vh[i]) * float(s[i]) for t in range(3)
            )
            assert float(scores[question, i]) == pytest.approx(expected, rel=1e-5)


def test_tokens_are_drawn_from_the_teachers_distribution() -> None:
    """10,000 draws from (.7, .2, .1): shares within four standard errors; the same generator gives the same tokens."""
    log_p = torch.tensor([0.7, 0.2, 0.1]).log().expand(10_000, 3)
    tokens = draw_tokens(log_p, torch.Generator().manual_seed(0))
    shares = tokens.bincount(minlength=3) / 10_000
    assert torch.allclose(shares, torch.tensor([0.7, 0.2, 0.1]), atol=4 * (0.25 / 10_000) ** 0.5)
    assert torch.equal(tokens, draw_tokens(log_p, torch.Generator().manual_seed(0)))


def test_taps_leave_no_hook_and_no_flag(distiller: Distiller) -> None:
    flags = [parameter.requires_grad for parameter in distiller.model.parameters()]
    with tapped_scores(distiller) as scored:
        rows = dict(scored(distiller.targets.batches[0], torch.Generator().manual_seed(0)))
    assert rows.keys() == distiller.factors.keys()
    assert all(score.shape == (12, len(distiller.factors[name].s)) for name, score in rows.items())
    assert [parameter.requires_grad for parameter in distiller.model.parameters()] == flags
    assert not any(linear._forward_hooks for linear in distiller.linears.values())
