"""AdaRank: its mask by hand, its gates before and after training, one step against autograd on whole weights."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch

from experiments.lab.adarank import START, TEMPERATURE, WEIGHT, adarank_gates, entropy, straight_through
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.gated_layers import gated
from vlmgraft.errors import RecipeError
from vlmgraft.spectral.gates import constant_gates


def test_the_mask_is_binary_and_its_gradient_the_sigmoids() -> None:
    mask = torch.tensor([0.1, -0.1, 0.0, 20.0], requires_grad=True)
    binary = straight_through(mask)
    torch.testing.assert_close(binary.detach(), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    (binary * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    soft = [1 / (1 + math.exp(-m / TEMPERATURE)) for m in (0.1, -0.1, 0.0, 20.0)]
    expected = [k * p * (1 - p) / TEMPERATURE for k, p in zip((1, 2, 3, 4), soft, strict=True)]
    assert mask.grad is not None and mask.grad.tolist() == pytest.approx(expected)


def test_entropies_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3), -math.inf, -math.inf]])
    expected = [math.log(4), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))]
    assert entropy(logits[:, :2]).tolist() == pytest.approx([math.log(2), expected[1]])
    assert float(entropy(logits[:1])) == pytest.approx(expected[0])


def test_before_the_first_step_it_is_task_arithmetic_at_the_prior(distiller: Distiller) -> None:
    gates = adarank_gates(distiller, steps=0)
    whole = constant_gates({name: tuple(f.s.shape) for name, f in distiller.factors.items()}, math.inf, WEIGHT)
    for name, factors in distiller.factors.items():
        torch.testing.assert_close(gates.spectrum(name, factors.s), whole.spectrum(name, factors.s))


def test_training_lowers_the_entropy_and_leaves_the_model_alone(distiller: Distiller) -> None:
    before = {name: tensor.clone() for name, tensor in distiller.model.state_dict().items()}
    batches = distiller.targets.batches

    @torch.no_grad()
    def mean_entropy(gates: object) -> float:
        with distiller.applied(gates) as model:  # type: ignore[arg-type]
            return float(torch.cat([entropy(batch.logits(model)) for batch in batches]).mean())

    start, trained = adarank_gates(distiller, steps=0), adarank_gates(distiller, steps=12, learning_rate=0.05)
    assert mean_entropy(trained) < mean_entropy(start)
    opened = torch.cat([trained.open(name) for name in trained.logits])
    assert 0 < float((opened == 0).float().mean()) < 1 and float(opened.max()) == 1
    assert all(tensor.equal(before[name]) for name, tensor in distiller.model.state_dict().items())
    again = adarank_gates(distiller, steps=12, learning_rate=0.05)
    assert all(again.logits[name].equal(logits) for name, logits in trained.logits.items())


def test_every_step_has_the_gradient_of_its_own_batch(distiller: Distiller) -> None:
    """Three steps of Adam with gradients taken anew each time: the losses are the same."""
    s = {name: factors.s for name, factors in distiller.factors.items()}
    masks = {name: torch.full_like(values, START).requires_grad_() for name, values in s.items()}
    weights = {name: torch.tensor(WEIGHT, requires_grad=True) for name in s}
    parameters, losses = [*masks.values(), *weights.values()], []
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    with gated(distiller.model, distiller.linears, distiller.factors) as layers:
        for batch in islice(distiller.targets.order(0), 3):
            layers.set({name: weights[name] * straight_through(masks[name]) * s[name] for name in s})
            loss = entropy(batch.logits(distiller.model)).mean()
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
            losses.append(float(loss.detach()))
    gates = adarank_gates(distiller, steps=3, learning_rate=0.05)
    assert [row["loss"] for row in gates.log] == pytest.approx(losses, abs=1e-6)


def test_settings_that_cannot_be_meant_are_refused(distiller: Distiller) -> None:
    with pytest.raises(RecipeError, match="learning_rate"):
        adarank_gates(distiller, learning_rate=0.0)
