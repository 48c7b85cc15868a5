"""One step of training against a loss written out, the schedule, and what a step averages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmgraft.distillation import targets, trainer
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.trainer import GateTrainer, Training


def test_the_kl_is_observed_as_often_as_logits_move() -> None:
    every = {rate: Training(learning_rate=rate).observe_every for rate in (1.0, 0.2, 0.1, 0.05, 1e-4)}
    assert every == {1.0: 1, 0.2: 3, 0.1: 6, 0.05: 12, 1e-4: 16}


def test_the_learning_rate_falls_by_a_cosine_to_a_twentieth() -> None:
    training = Training(steps=100, learning_rate=0.2)
    assert training.learning_rate_at(0) == pytest.approx(0.2)
    assert training.learning_rate_at(50) == pytest.approx(0.2 * (1 + 0.05) / 2)
    assert training.learning_rate_at(25) == pytest.approx(0.2 * (0.05 + 0.95 * (0.5 + 0.5**0.5 / 2)))
    assert training.learning_rate_at(100) == pytest.approx(0.01)


def test_every_step_is_taken_at_the_scheduled_rate(distiller: Distiller, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    ordinary = torch.optim.Adam.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return ordinary(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    distiller.learn(steps=4, learning_rate=0.1)
    assert rates == pytest.approx([Training(steps=4, learning_rate=0.1).learning_rate_at(n) for n in range(4)])
    assert rates[0] == 0.1 and sorted(rates, reverse=True) == rates


def naive_loss(distiller: Distiller, logits: dict[str, torch.Tensor], batches: Any, weight: float) -> torch.Tensor:
    """KL on the batches − weight · injected share of the energy, with merged weights instead of gated layers."""
    merged = {name: distiller.linears[name].weight.detach() for name in logits}
    for name, factors in distiller.factors.items():
        spectrum = 0.7 * logits[name].sigmoid() * factors.s
        merged[name] = merged[name] + (factors.U * spectrum) @ factors.Vh
    opened = sum((logits[name].sigmoid() * f.s).square().sum() for name, f in distiller.factors.items())
    energy = opened / sum(f.s.square().sum() for f in distiller.factors.values())
    parameters = {id(p): name for name, p in distiller.model.named_parameters()}
    state = {parameters[id(distiller.linears[name].weight)]: value for name, value in merged.items()}
    kls = []
    for batch in batches:
        output = torch.func.functional_call(distiller.model, state, kwargs={**batch.inputs, "use_cache": False})
        log_q, log_p = output.logits[batch.predicts].log_softmax(-1), batch.target.log_p
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return sum(kls) / len(kls) - weight * energy


def test_a_step_follows_the_gradient_of_the_loss_written_out(
    distiller: Distiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches a step: the gradient is that of KL averaged over both, less the weighted share of energy."""
    gradients, rows = [], []
    ordinary = GateTrainer._step

    def step(self: GateTrainer, keep: Any, donor: Any) -> Any:
        row = ordinary(self, keep, donor)
        gradients.append((list(keep), self.vector.logits.grad.clone()))
        rows.append(row)
        return row

    monkeypatch.setattr(GateTrainer, "_step", step)
    distiller.learn(scale=0.7, steps=1, inject_weight=0.3, batches_per_step=2)
    batches, gradient = gradients[0]
    assert len(batches) == 2
    logits = {name: torch.zeros_like(f.s, requires_grad=True) for name, f in distiller.factors.items()}
    loss = naive_loss(distiller, logits, batches, 0.3)
    expected = torch.cat(torch.autograd.grad(loss, [*logits.values()]))
    assert rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-6)
    assert rows[0]["energy"] == pytest.approx(0.25) and rows[0]["inject"] == pytest.approx(-0.25)
    assert rows[0]["kl"] == pytest.approx(loss.item() + 0.3 * 0.25, rel=1e-3)
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:kl_budget is measured")
def test_the_log_has_every_tenth_step_and_the_last_one(distiller: Distiller) -> None:
    gates = distiller.learn(steps=13, log_every=5, kl_budget=0.01, start=-3.0)
    assert [row["step"] for row in gates.log] == [0, 5, 10, 12]
    weights = [row["inject_weight"] for row in gates.log]
    assert weights == sorted(weights) and weights[0] > 0.1, "below the budget the weight grows from its start"
    assert all(len(row["histogram"]) == 10 for row in gates.log)


@pytest.mark.filterwarnings("ignore:kl_budget is measured")
def test_of_cut_distributions_the_bound_from_above_is_that_of_the_final_gates(
    distiller: Distiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "FULL_VOCABULARY", 8)
    monkeypatch.setattr(targets.Distribution.of.__func__, "__defaults__", (8,))
    few = Distiller(
        distiller.model, distiller.processor, distiller.factors, distiller.questions[:8], distiller.held_out[:8],
        max_new_tokens=4, batch_size=4,
    )  # fmt: skip
    assert few.held_out_targets is not None and not few.held_out_targets.whole
    gates = few.learn(steps=2, kl_budget=0.01)
    with few.applied(gates) as model:
        lower, upper = few.held_out_targets.mean_bounds(model)
        assert lower == pytest.approx(few.held_out_targets.mean_kl(model))
    assert gates.settings["held_out_kl"] == pytest.approx(lower, rel=1e-3)
    assert gates.settings["held_out_kl_upper"] == pytest.approx(upper, rel=1e-3) and upper > lower
    assert "held_out_kl_upper" not in distiller.learn(steps=0, kl_budget=0.01).settings, "whole ones need no bound"


def test_the_parts_of_all_processes_are_added_and_the_energy_term_counts_once(
    distiller: Distiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    step = torch.optim.Adam.step

    def watched(self: torch.optim.Adam) -> Any:
        gradients.append(self.param_groups[0]["params"][0].grad.clone())
        return step(self)

    def twice(part: torch.Tensor) -> list[torch.Tensor]:
        parts.append(part.clone())
        return [part, part]

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    alone = distiller.learn(steps=1, inject_weight=0.1)
    monkeypatch.setattr(trainer, "of_all", twice)
    together = distiller.learn(steps=1, inject_weight=0.1)
    (part,) = parts
    assert part.shape == (sum(len(f.s) for f in distiller.factors.values()) + 1,)
    assert float(part[-1]) == pytest.approx(alone.log[0]["kl"], rel=1e-4, abs=1e-6)
    assert together.log[0]["kl"] == pytest.approx(2 * alone.log[0]["kl"], rel=1e-4, abs=1e-6)
    assert together.log[0]["inject"] == alone.log[0]["inject"]
    energy = torch.cat([f.s for f in distiller.factors.values()]).square()
    slope = -0.1 * 2 * 0.5 * 0.25 * energy / energy.sum()  # of σ(g)² s² at g = 0
    for count, gradient in enumerate(gradients, 1):
        torch.testing.assert_close(gradient, slope + count * part[:-1], rtol=1e-4, atol=1e-6 * float(slope.abs().max()))
