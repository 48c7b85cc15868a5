"""The all-weights baseline: a twin by plain autograd, what each loss term does, and a model that is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from experiments.lab import all_weights as module
from experiments.lab.all_weights import learn_weights
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.targets import Targets
from vlmgraft.errors import RecipeError
from vlmgraft.hf.batches import Question
from vlmgraft.hf.modules import match_linears

Matrices = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def donor_targets(distiller: Distiller, donor: Any, processor: Any) -> Targets:
    asked = [Question(f"sum {i} {i + 3} red {i + 1}") for i in range(8)]
    return distiller.donor_targets(donor, processor.tokenizer, asked, batch_size=8)


@pytest.fixture(scope="module")
def start(distiller: Distiller) -> Matrices:
    """Task arithmetic at a half."""
    linears = match_linears(distiller.model, distiller.factors)
    return {name: linears[name].weight.detach() + 0.5 * f.update() for name, f in distiller.factors.items()}


def test_no_steps_are_the_start_or_the_vlm(distiller: Distiller, donor_targets: Targets, start: Matrices) -> None:
    begun = learn_weights(distiller, donor_targets, start, steps=0).weights
    assert all(begun[name].equal(start[name]) for name in start)
    linears = match_linears(distiller.model, distiller.factors)
    alone = learn_weights(distiller, donor_targets, steps=0).weights
    assert set(alone) == set(distiller.factors)
    assert all(alone[name].equal(linears[name].weight) for name in alone)


def test_the_first_step_follows_the_gradient_of_both_terms(
    distiller: Distiller, donor_targets: Targets, start: Matrices
) -> None:
    """Twin: the loss written out on a copy of the model; Adam's first step is the rate times the gradient's sign."""
    rate, alpha = 1e-4, 2.0
    trained = learn_weights(distiller, donor_targets, start, inject_weight=alpha, steps=1, learning_rate=rate)
    twin = copy.deepcopy(distiller.model)
    linears = match_linears(twin, start)
    for name, linear in linears.items():
        linear.weight.data = start[name].clone()
    keep, match = next(distiller.targets.order(0)), next(donor_targets.order(1))
    (keep.kl(twin).mean() + alpha * match.kl(twin).mean()).backward()
    for name, linear in linears.items():
        gradient = linear.weight.grad
        assert gradient is not None
        clear = gradient.abs() > 0.1 * gradient.abs().max()  # far above Adam's epsilon
        moved = trained.weights[name] - start[name]
        assert torch.allclose(moved[clear], -rate * gradient[clear].sign(), atol=0.05 * rate), name


def test_each_term_lowers_what_it_measures(distiller: Distiller, donor_targets: Targets, start: Matrices) -> None:
    settings: dict[str, Any] = {"steps": 12, "learning_rate": 1e-4}
    kept = dict(learn_weights(distiller, donor_targets, start, inject_weight=0.0, **settings).weights)
    matched = dict(learn_weights(distiller, donor_targets, start, inject_weight=30.0, **settings).weights)
    kl = {name: distiller.keep_kl(each) for name, each in (("start", start), ("kept", kept), ("matched", matched))}
    donor = {name: distiller.keep_kl(each, donor_targets) for name, each in (("start", start), ("matched", matched))}
    assert kl["kept"] < 0.95 * kl["start"]
    assert donor["matched"] < 0.97 * donor["start"]
    assert kl["matched"] > kl["kept"]


def test_a_larger_budget_lets_more_of_the_donor_in(
    distiller: Distiller, donor_targets: Targets, start: Matrices
) -> None:
    kl, donor = [], []
    for share in (0.3, 1.5):
        budget = share * distiller.keep_kl(start)
        trained = learn_weights(distiller, donor_targets, start, kl_budget=budget, steps=24, learning_rate=1e-4)
        kl.append(distiller.keep_kl(dict(trained.weights)))
        donor.append(distiller.keep_kl(dict(trained.weights), donor_targets))
        assert kl[-1] == pytest.approx(trained.settings["held_out_kl"], rel=1e-3)
        assert kl[-1] < 1.4 * budget
        assert trained.log[-1]["step"] == 23
    assert kl[0] < kl[1] and donor[0] > donor[1]


def test_the_model_is_left_as_it_was(
    distiller: Distiller, donor_targets: Targets, start: Matrices, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = distiller.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    learn_weights(distiller, donor_targets, start, steps=2)

    def fail(*_: object) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(module, "_step", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        learn_weights(distiller, donor_targets, start, steps=2)
    assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_settings_that_exclude_each_other_are_refused(distiller: Distiller, donor_targets: Targets) -> None:
    with pytest.raises(RecipeError, match="exclude each other"):
        learn_weights(distiller, donor_targets, inject_weight=1.0, kl_budget=0.1)
    alone = copy.copy(distiller)
    alone.held_out_targets = None
    with pytest.raises(RecipeError, match="held-out"):
        learn_weights(alone, donor_targets, kl_budget=0.1)
