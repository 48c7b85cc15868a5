"""Gates by self-distillation: identities, what each loss term does, and a model that is left alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.targets import Targets
from vlmgraft.errors import CheckpointError, DataError, RecipeError
from vlmgraft.hf.batches import Question, generate_batch
from vlmgraft.hf.modules import match_linears
from vlmgraft.methods.frism import GatedFold
from vlmgraft.spectral.factor_store import FactorStore
from vlmgraft.spectral.factors import Factors, factorize
from vlmgraft.spectral.gate_store import load_gates, save_gates
from vlmgraft.spectral.gates import constant_gates

Table = dict[str, Factors]


@pytest.fixture(scope="module")
def donor_targets(distiller: Distiller, donor: Any, processor: Any) -> Targets:
    asked = [Question(f"sum {i} {i + 3} red {i + 1}") for i in range(8)]
    return distiller.donor_targets(donor, processor.tokenizer, asked, batch_size=4)


def task_arithmetic(vlm: Any, factors: Table, scale: float) -> dict[str, torch.Tensor]:
    linears = match_linears(vlm, factors)
    return {name: linears[name].weight.detach() + scale * factors[name].update() for name in factors}


@pytest.mark.parametrize(("logit", "share"), [(0.0, 0.5), (math.inf, 1.0)])
def test_constant_gates_are_task_arithmetic(
    distiller: Distiller, vlm: Any, factors: Table, logit: float, share: float
) -> None:
    gates = constant_gates({name: len(f.s) for name, f in factors.items()}, logit, 0.8)
    weights = task_arithmetic(vlm, factors, 0.8 * share)
    assert distiller.keep_kl(gates) == pytest.approx(distiller.keep_kl(weights), rel=1e-3)
    assert distiller.keep_kl(gates) > 1e-4


def test_closed_gates_are_the_vlm(distiller: Distiller, factors: Table, questions: list[Question]) -> None:
    gates = constant_gates({name: len(f.s) for name, f in factors.items()}, -math.inf, 0.8)
    batch = distiller.targets.batches[0]
    with torch.no_grad():
        before = batch.logits(distiller.model)
        with distiller.applied(gates) as model:
            assert batch.logits(model).equal(before)
    assert distiller.keep_kl(gates) == distiller.keep_kl(None) == pytest.approx(0, abs=1e-7)


def test_zero_steps_leave_the_start(distiller: Distiller, factors: Table) -> None:
    gates = distiller.learn(scale=0.5, steps=0)
    assert all(logits.equal(torch.zeros(len(factors[name].s))) for name, logits in gates.logits.items())
    assert gates.scale == 0.5 and gates.settings["energy"] == pytest.approx(0.25)
    again = distiller.learn(scale=0.5, steps=0, start=distiller.learn(steps=2))
    assert any(bool((logits != 0).any()) for logits in again.logits.values())


def test_without_injection_the_gates_close(distiller: Distiller) -> None:
    gates = distiller.learn(steps=150, inject_weight=0.0, learning_rate=0.1)
    start, end = gates.log[0], gates.log[-1]
    assert end["kl"] < 0.05 * start["kl"]
    assert end["energy"] < 0.8 * start["energy"], (
        "directions that the calibration set does not feel stay where they are"
    )
    assert sum(end["histogram"][:5]) > 0.6 and sum(end["histogram"]) == pytest.approx(1, abs=1e-2)


def test_a_larger_injection_weight_injects_more(distiller: Distiller) -> None:
    energies = [distiller.learn(steps=15, inject_weight=w).settings["energy"] for w in (0.0, 0.003, 0.3)]
    assert energies[0] < energies[1] < energies[2] and energies[2] > 0.25


def test_donor_matching_moves_towards_the_donor(distiller: Distiller, donor_targets: Targets) -> None:
    closed = distiller.keep_kl(None, donor_targets)
    gates = distiller.learn(inject="donor", donor=donor_targets, inject_weight=3.0, steps=30, learning_rate=0.1)
    start = distiller.keep_kl(distiller.learn(steps=0), donor_targets)
    assert distiller.keep_kl(gates, donor_targets) < min(start, closed)
    assert gates.settings["inject"] == "donor" and gates.log[-1]["inject"] < gates.log[0]["inject"]


@pytest.mark.filterwarnings("ignore:kl_budget is measured")
def test_a_kl_budget_is_met_on_held_out_prompts(distiller: Distiller, donor_targets: Targets) -> None:
    budget = 0.004
    gates = distiller.learn(inject="donor", donor=donor_targets, kl_budget=budget, steps=100)
    assert distiller.keep_kl(gates) == pytest.approx(budget, rel=0.1)
    assert gates.settings["held_out_kl"] == pytest.approx(distiller.keep_kl(gates), rel=1e-3)


@pytest.mark.filterwarnings("ignore:kl_budget is measured")
@pytest.mark.parametrize("inject", ["energy", "donor"])
def test_an_unfinished_training_still_keeps_the_budget(
    distiller: Distiller, donor_targets: Targets, inject: Literal["energy", "donor"]
) -> None:
    """Two steps leave the control no time; what is above the budget is closed, in energy also what is below opened."""
    few: dict[str, Any] = {"inject": inject, "donor": donor_targets if inject == "donor" else None, "steps": 2}
    start = distiller.keep_kl(distiller.learn(steps=0))
    closed = distiller.learn(kl_budget=start / 5, **few)
    assert closed.settings["landing"] < 0
    assert 0.97 * start / 5 <= distiller.keep_kl(closed) <= 1.001 * start / 5
    opened = distiller.learn(kl_budget=start * 1.5, start=-2.0, **few)
    assert opened.settings["landing"] == 0 if inject == "donor" else opened.settings["landing"] > 0
    assert distiller.keep_kl(opened) == pytest.approx(opened.settings["held_out_kl"], rel=1e-3)
    assert inject == "donor" or 0.97 * start * 1.5 <= opened.settings["held_out_kl"] <= start * 1.5


@pytest.mark.parametrize("granularity", ["matrix", "layer"])
def test_coarser_gates_share_their_logits(distiller: Distiller, factors: Table, granularity: str) -> None:
    gates = distiller.learn(steps=12, granularity=granularity)
    assert all(bool((logits == logits[0]).all()) for logits in gates.logits.values())
    distinct = {round(float(logits[0]), 4) for logits in gates.logits.values()}
    assert (len(distinct) <= 4) if granularity == "layer" else (len(distinct) > 8)


def test_the_same_seed_gives_the_same_gates(distiller: Distiller) -> None:
    first, second, other = (distiller.learn(steps=5, seed=seed) for seed in (1, 1, 2))
    assert all(first.logits[name].equal(second.logits[name]) for name in first.logits)
    assert any(not first.logits[name].equal(other.logits[name]) for name in first.logits)


def test_the_model_is_left_as_it_was_also_when_training_fails(distiller: Distiller, vlm: Any) -> None:
    before = {name: value.clone() for name, value in vlm.state_dict().items()}
    flags = [parameter.requires_grad for parameter in vlm.parameters()]

    def fail(row: dict[str, Any]) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        distiller.learn(steps=3, on_step=fail)
    with pytest.raises(RuntimeError), distiller.applied(task_arithmetic(vlm, dict(distiller.factors), 1.0)):
        raise RuntimeError
    after = vlm.state_dict()
    assert list(after) == list(before) and all(after[name].equal(before[name]) for name in before)
    assert [parameter.requires_grad for parameter in vlm.parameters()] == flags
    assert all(parameter.grad is None for parameter in vlm.parameters())


def test_gated_models_answer_and_other_models_are_measured(distiller: Distiller, donor: Any) -> None:
    gates = distiller.learn(steps=1)
    with distiller.applied(gates) as model:
        assert len(generate_batch(model, distiller.processor, distiller.questions[:2], 3)[0]) == 2
    assert distiller.keep_kl(distiller.model) == pytest.approx(0, abs=1e-6)


def test_gates_survive_a_folder(distiller: Distiller, tmp_path: Path) -> None:
    gates = distiller.learn(steps=3)
    save_gates(gates, tmp_path / "gates")
    found = load_gates(tmp_path / "gates")
    assert found.scale == gates.scale and found.settings == gates.settings and found.log == gates.log
    assert all(found.logits[name].equal(gates.logits[name]) for name in gates.logits)
    (tmp_path / "gates" / "gates.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not of a complete gates folder"):
        load_gates(tmp_path / "gates")
    with pytest.raises(CheckpointError, match="3 directions"):
        gates.spectrum(next(iter(gates.logits)), torch.ones(3))


def test_wrong_settings_are_refused_before_training(distiller: Distiller, questions: list[Question]) -> None:
    for settings, message in [
        ({"inject": "energi"}, "energi"),
        ({"inject": "donor"}, "needs `donor`"),
        ({"kl_budget": 0.1, "inject_weight": 1.0}, "exclude each other"),
        ({"kl_budget": 0.0}, "must be above 0"),
        ({"granularity": "head"}, "granularity"),
        ({"steps": -1}, "steps"),
    ]:
        with pytest.raises(RecipeError, match=message):
            distiller.learn(**settings)
    with pytest.raises(DataError, match="text only"):
        distiller.donor_targets(distiller.model, distiller.processor, questions[:1])


def test_a_task_vector_of_another_tensor_is_refused(vlm: Any, processor: Any, questions: list[Question]) -> None:
    name = "model.layers.0.post_attention_layernorm.weight"
    with pytest.raises(Exception, match="post_attention_layernorm"):
        Distiller(vlm, processor, {name: factorize(torch.ones(2, 2), name, name)}, questions)


@pytest.mark.filterwarnings("ignore:kl_budget is measured")
@pytest.mark.parametrize("stop", [7, 8, 13])
def test_an_interrupted_training_goes_on_to_the_same_gates(
    distiller: Distiller, donor_targets: Targets, tmp_path: Path, stop: int
) -> None:
    """Stopped anywhere and started again, also with a control in the loop: the gates of an uninterrupted training."""
    options: dict[str, Any] = {"inject": "donor", "donor": donor_targets, "kl_budget": 0.01, "steps": 16}
    options |= {"log_every": 1}
    whole = distiller.learn(**options)

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == stop:
            raise KeyboardInterrupt

    state = tmp_path / "work" / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        distiller.learn(**options, on_step=kill, state=state, save_every=4)
    steps: list[int] = []
    again = distiller.learn(**options, on_step=lambda row: steps.append(row["step"]), state=state, save_every=4)
    assert steps[0] == stop // 4 * 4, "at most `save_every` steps are repeated"
    assert all(again.logits[name].equal(whole.logits[name]) for name in whole.logits)
    assert again.log == whole.log and again.settings == whole.settings
    with pytest.raises(RecipeError, match="other settings"):
        distiller.learn(**{**options, "steps": 20}, state=state)


def test_gates_carry_the_digest_of_their_store(
    vlm: Any, processor: Any, factors: Table, questions: list[Question], tmp_path: Path
) -> None:
    store = FactorStore(tmp_path)
    name = next(iter(factors))
    for value in factors.values():
        store.save(value, "d")
    store.finish(list(factors), {})
    gates = Distiller(vlm, processor, store, questions[:4], max_new_tokens=4).learn(steps=1)
    assert gates.factors == store.digest
    assert GatedFold(store, gates).gates is gates
    store.save(factorize(torch.ones(factors[name].shape), name, name), "other")
    store.finish(list(factors), {})
    with pytest.raises(CheckpointError, match="made for factors"):
        GatedFold(store, gates)
