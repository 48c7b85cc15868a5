"""Core gates: the frame and its decomposition, the start, the budget, a model that is left alone, and the fold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.lab.beside_gates import table
from experiments.lab.core_gates import CoreTraining, cores_applied, first, learn_core, turned
from vlmgraft.distillation.distill import Distiller
from vlmgraft.errors import RecipeError
from vlmgraft.methods.frism import GatedFold
from vlmgraft.spectral.factors import factorize
from vlmgraft.storage.jsonl import read_rows


def test_a_core_is_a_decomposition_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    tau, core = torch.randn(12, 9, generator=generator), torch.randn(4, 4, generator=generator)
    frame = first(factorize(tau, "t", "t"), 4)
    U, _, Vh = torch.linalg.svd(tau.double())
    learned = turned(frame, core)
    sign = torch.sign((frame.U.double() * U[:, :4]).sum(0))  # an SVD's signs are free
    expected = (U[:, :4] * sign) @ core.double() @ (Vh[:4] * sign[:, None])
    torch.testing.assert_close((learned.U * learned.s) @ learned.Vh, expected.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(learned.U.mT @ learned.U, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(learned.s, torch.linalg.svdvals(core))


def test_without_a_step_it_is_the_truncated_task_vector(distiller: Distiller) -> None:
    learned, gates = learn_core(distiller, CoreTraining(rank=3, start=0.7, steps=0))
    fold = GatedFold(learned, gates)
    for name, factors in distiller.factors.items():
        V = torch.zeros(factors.shape)
        expected = 0.7 * (factors.U[:, :3].float() * factors.s[:3]) @ factors.Vh[:3].float()
        torch.testing.assert_close(fold.matrix(name, V), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("start", [0.5, 1.25])
def test_the_distance_is_relative_to_the_task_vector(start: float, distiller: Distiller) -> None:
    """‖M − diag(s)‖²/‖s‖² of M = c·diag(s) is (1 − c)²."""
    _, gates = learn_core(distiller, CoreTraining(rank=4, start=start, steps=1))
    assert gates.log[0]["inject"] == pytest.approx((1 - start) ** 2, abs=1e-6)


def test_a_budget_is_met_and_the_fold_has_the_kl_of_the_training(distiller: Distiller) -> None:
    before = {name: tensor.clone() for name, tensor in distiller.model.state_dict().items()}
    everything, _ = learn_core(distiller, CoreTraining(rank=8, start=1.0, steps=0))
    start = distiller.keep_kl({n: weight(distiller, n) + update(f) for n, f in everything.items()})
    budget = 0.3 * start
    learned, gates = learn_core(distiller, CoreTraining(rank=8, start=1.0, steps=4, kl_budget=budget))
    assert 0.97 * budget <= gates.settings["held_out_kl"] <= budget
    folded = {name: GatedFold(learned, gates).matrix(name, weight(distiller, name)) for name in learned}
    assert distiller.keep_kl(folded) == pytest.approx(gates.settings["held_out_kl"], rel=0.02)
    assert all(tensor.equal(before[name]) for name, tensor in distiller.model.state_dict().items())
    assert any(not torch.equal(learned[name].s, everything[name].s) for name in learned)
    mixed = [learned[name].U.mT @ everything[name].U for name in learned]
    assert max(float((m - m.diag().diag()).abs().max()) for m in mixed) > 1e-3  # directions were turned


def test_the_gradient_is_that_of_the_merged_weight(distiller: Distiller) -> None:
    """Against a difference quotient along the gradient of the projection that has the largest."""
    frames = {key: first(factors, 3) for key, factors in distiller.factors.items()}
    cores = {key: (0.5 * frame.s.diag()).requires_grad_() for key, frame in frames.items()}
    batch = distiller.targets.batches[0]
    with cores_applied(distiller, frames, cores):
        batch.kl(distiller.model).mean().backward()
    gradients = {key: core.grad for key, core in cores.items() if core.grad is not None}
    name = max(gradients, key=lambda key: float(gradients[key].norm()))
    step = 0.1 * gradients[name] / gradients[name].norm()
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            moved = {key: core.detach() + (sign * step if key == name else 0) for key, core in cores.items()}
            with cores_applied(distiller, frames, moved):
                losses.append(float(batch.kl(distiller.model).double().mean()))
    assert (losses[0] - losses[1]) / 0.2 == pytest.approx(float(gradients[name].norm()), rel=0.05)


@pytest.mark.parametrize("options", [{"rank": 0}, {"weight": 1.0, "kl_budget": 0.1}, {"kl_budget": 0.0}])
def test_settings_that_cannot_be_meant_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        CoreTraining(**options)  # type: ignore[arg-type]


def weight(distiller: Distiller, name: str) -> torch.Tensor:
    return distiller.linears[name].weight.detach().float().clone()


def update(factors: object) -> torch.Tensor:
    return (factors.U * factors.s) @ factors.Vh  # type: ignore[attr-defined]


def test_the_table_beside_gates_is_that_of_its_rows() -> None:
    rows = Path(__file__).parents[2] / "benchmarks" / "results" / "lab" / "beside-gates-0.jsonl"
    _, *measured = read_rows(rows)
    assert table(measured) == rows.with_suffix(".md").read_text(encoding="utf-8")
