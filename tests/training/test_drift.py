"""DRIFT's Δ from folders, and one push on a model's gradients, against the naive formulas."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError, CheckpointError, NumericalError, RecipeError, WeightsError
from vlmgraft.hf.models import load_vlm, text_linears
from vlmgraft.spectral.factors import factorize
from vlmgraft.spectral.gates import constant_gates
from vlmgraft.training.drift import Bound, bind_prior
from vlmgraft.training.drift_targets import LowRank
from vlmgraft.training.prior import Mode, PushRule, pushed
from vlmgraft.training.prior_delta import Delta, Prior, filtered_prior, make_prior

MODULES = ("attention", "norm")
Q0 = "model.layers.0.self_attn.q_proj.weight"


def aligned(trio: Path, donor: Path | None = None, modules: Any = MODULES) -> Alignment:
    folders = (trio / "vlm", donor or trio / "donor", trio / "base")
    return align(*(open_checkpoint(folder) for folder in folders), modules=modules)


def exact(trio: Path, rule: PushRule, **options: Any) -> Prior:
    return make_prior(aligned(trio), rule, dtype=torch.float32, **options)


def with_gradients(model: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random gradients on all parameters; the copies by role for linears."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return {role: linear.weight.grad.clone() for role, linear in text_linears(model).items()}


@pytest.fixture
def model(trio: Path) -> Any:
    return load_vlm(trio / "vlm", torch.float32)


def changed(folder: Path, to: Path, name: str, value: float | None) -> Path:
    """A copy of a checkpoint with one tensor filled, or as it is."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    if value is not None:
        tensors[name].fill_(value)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("minus", ["vlm", "base"])
def test_delta_is_the_difference_of_the_folders_and_every_tensor_has_a_verdict(trio: Path, minus: Any) -> None:
    prior = exact(trio, PushRule(), minus=minus)
    files = {name: load_file(trio / name / "model.safetensors") for name in ("vlm", "donor", "base")}
    assert {verdict.name for verdict in prior.verdicts} == set(files["vlm"])
    pushed_names = {verdict.name for verdict in prior.verdicts if verdict.verdict == "pushed"}
    assert pushed_names == set(prior.deltas) and Q0 in pushed_names
    assert all(verdict.reason for verdict in prior.verdicts)
    for name, delta in prior.deltas.items():
        expected = files["donor"][name].float() - files[minus][name].float()
        assert delta.value.equal(expected), name
        assert delta.norm == pytest.approx(float(expected.norm()), rel=1e-5)
        assert delta.start == pytest.approx(float((files["vlm"][name].float() * expected).sum()), abs=1e-3)


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("store", ["device", "cpu"])
def test_a_push_is_the_naive_one_on_every_tensor_and_touches_nothing_else(
    trio: Path, model: Any, mode: Any, store: Any
) -> None:
    rule = PushRule(mode, 0.7)
    prior = exact(trio, rule, store=store)
    with_gradients(model)
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    bound = bind_prior(prior, model)
    bound.push()
    for name, parameter in model.named_parameters():
        delta = prior.deltas.get(name.replace("model.language_model.", "model."))
        expected = before[name] if delta is None else pushed(before[name], delta.value, rule)
        assert torch.allclose(parameter.grad, expected, atol=1e-5, rtol=1e-5), name
    cos, strength = bound.last[Q0]
    grad, value = before["model.language_model.layers.0.self_attn.q_proj.weight"], prior.deltas[Q0].value
    assert cos == pytest.approx(float((grad * value).sum() / grad.norm() / value.norm()), abs=1e-5)
    if mode == "adaptive":
        assert strength == pytest.approx(0.7 * (1 + cos) / 2, rel=1e-5)


def test_rescaled_absolute_takes_delta_at_the_norm_of_the_weight(trio: Path, model: Any) -> None:
    rule = PushRule("absolute", 0.1, rescale=True)
    prior, grads = exact(trio, rule), with_gradients(model)
    weight = text_linears(model)["layers.0.self_attn.q_proj.weight"].weight
    bind_prior(prior, model).push()
    expected = pushed(grads["layers.0.self_attn.q_proj.weight"], prior.deltas[Q0].value, rule, weight.detach())
    assert torch.allclose(weight.grad, expected, atol=1e-4)


def test_the_schedule_and_a_loss_scale_reach_the_push(trio: Path, model: Any) -> None:
    role = "layers.0.self_attn.q_proj.weight"
    for mode in get_args(Mode):
        prior = exact(trio, PushRule(mode, 2.0, "linear"))
        before = with_gradients(model)[role]
        for parameter in model.parameters():
            parameter.grad *= 1024
        bind_prior(prior, model).push(progress=0.75, loss_scale=1024)
        expected = pushed(before, prior.deltas[Q0].value, PushRule(mode, 0.5))
        assert torch.allclose(text_linears(model)[role].weight.grad / 1024, expected, atol=1e-5), mode


def test_bfloat16_is_close_and_the_default(trio: Path, model: Any) -> None:
    prior, grads = make_prior(aligned(trio), PushRule()), with_gradients(model)
    assert prior.deltas[Q0].value.dtype == torch.bfloat16
    bind_prior(prior, model).push()
    role = "layers.0.self_attn.q_proj.weight"
    naive = pushed(grads[role], exact(trio, PushRule()).deltas[Q0].value, PushRule())
    assert (text_linears(model)[role].weight.grad - naive).norm() <= 3e-3 * naive.norm()


def test_the_way_made_is_a_share_of_delta(trio: Path, model: Any) -> None:
    prior = exact(trio, PushRule())
    bound = bind_prior(prior, model)
    assert max(abs(value) for value in bound.moved().values()) < 1e-4
    with torch.no_grad():
        for target in bound.targets:
            target.parameters()[0].add_(target.delta.value, alpha=0.25)
    assert list(bound.moved().values()) == pytest.approx([0.25] * len(bound.targets), abs=1e-4)


def test_gradients_that_are_missing_are_left_out(trio: Path, model: Any) -> None:
    bound = bind_prior(exact(trio, PushRule()), model)
    bound.push()
    assert bound.last == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_gradient_is_named_and_an_overflow_is_left_to_the_scaler(trio: Path, model: Any, value: float) -> None:
    bound = bind_prior(exact(trio, PushRule()), model)
    before = with_gradients(model)
    text_linears(model)["layers.0.self_attn.q_proj.weight"].weight.grad[0, 0] = value
    with pytest.raises(NumericalError, match="self_attn"):
        bound.push()
    bound.push(loss_scale=1024, overflow=True)
    assert bound.skipped == 1
    other = "layers.1.self_attn.q_proj.weight"
    assert text_linears(model)[other].weight.grad.equal(before[other])


def lora(model: Any, **options: Any) -> Any:
    targets = r".*language_model.*self_attn\.(q|v)_proj"
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, **options))


@pytest.mark.parametrize("mode", get_args(Mode))
def test_lora_is_pushed_along_the_pulled_back_delta(trio: Path, model: Any, mode: Any) -> None:
    """Autograd says what ⟨W, Δ⟩ has for a gradient in A and B; the pair is pushed as one vector."""
    rule, tuned = PushRule(mode, 0.7), lora(model)
    prior = make_prior(aligned(trio, modules=["*.q_proj.weight"]), rule, dtype=torch.float32)
    bound = bind_prior(prior, tuned)
    assert len(bound.targets) == 4 and all(isinstance(target, LowRank) for target in bound.targets)
    target: Any = bound.targets[0]
    torch.nn.init.normal_(target.B, std=0.1)
    (target.scaling * (target.B @ target.A) * target.delta.value).sum().backward()
    along = torch.cat([target.A.grad.reshape(-1), target.B.grad.reshape(-1)])
    product = (target.scaling * (target.B @ target.A) * target.delta.value).sum()
    assert bound.moved()[Q0] * target.delta.norm**2 == pytest.approx(float(product.detach()), rel=1e-4)
    with_gradients(tuned, 3)
    grads = torch.cat([target.A.grad.reshape(-1), target.B.grad.reshape(-1)])
    bound.push()
    after = torch.cat([target.A.grad.reshape(-1), target.B.grad.reshape(-1)])
    assert torch.allclose(after, pushed(grads, along, rule), atol=1e-4, rtol=1e-4)


def test_lora_elsewhere_and_variants_are_named(trio: Path, model: Any) -> None:
    prior = exact(trio, PushRule())
    tuned = lora(model)
    verdicts = {verdict.name: verdict for verdict in bind_prior(prior, tuned).verdicts}
    assert "frozen" in verdicts["model.layers.0.self_attn.o_proj.weight"].reason
    assert verdicts[Q0].verdict == "pushed"
    with pytest.raises(RecipeError, match=r"prior\.rescale: .* adapter"):
        bind_prior(exact(trio, PushRule("absolute", rescale=True)), tuned)
    with pytest.raises(RecipeError, match="DoRA"):
        bind_prior(prior, lora(load_vlm(trio / "vlm", torch.float32), use_dora=True))


def test_a_head_that_an_adapter_saves_whole(model: Any) -> None:
    tuned = lora(model, modules_to_save=["lm_head"])
    value = torch.ones_like(model.lm_head.weight)
    delta = Delta("lm_head.weight", "lm_head.weight", "head", value, float(value.norm()), 0.0, 1.0)
    bound = bind_prior(Prior(PushRule("absolute", 0.5), {"lm_head.weight": delta}, ()), tuned)
    with_gradients(tuned)
    before = tuned.lm_head.modules_to_save.default.weight.grad.clone()
    bound.push()
    assert torch.allclose(tuned.lm_head.modules_to_save.default.weight.grad, before - 0.5, atol=1e-5)


def test_a_prior_behind_gates(trio: Path, tmp_path: Path) -> None:
    alignment = aligned(trio, modules=["*.q_proj.weight", "norm"])
    full = make_prior(alignment, minus="base", dtype=torch.float32)
    factors = {Q0: factorize(full.deltas[Q0].value, Q0, "layers.0.self_attn.q_proj.weight")}
    gates = constant_gates({Q0: len(factors[Q0].s)}, 0.0, scale=3.0)
    prior = filtered_prior(alignment, factors, gates, dtype=torch.float32)
    assert list(prior.deltas) == [Q0]  # half open everywhere: half of the task vector, whatever λ is
    assert torch.allclose(prior.deltas[Q0].value, full.deltas[Q0].value / 2, atol=1e-5)
    reasons = {verdict.name: verdict.reason for verdict in prior.verdicts}
    assert "no gates" in reasons["model.layers.1.self_attn.q_proj.weight"]
    shut = constant_gates({Q0: len(factors[Q0].s)}, -float("inf"), scale=1.0)
    with pytest.raises(AlignmentError, match="nothing to push"):
        filtered_prior(alignment, factors, shut)


def test_gates_of_other_factors_are_refused(trio: Path) -> None:
    class Store(dict):  # type: ignore[type-arg]
        digest = "one"

    gates = constant_gates({Q0: 3}, 0.0, 1.0)
    object.__setattr__(gates, "factors", "two")
    with pytest.raises(CheckpointError, match="factors two, these are one"):
        filtered_prior(aligned(trio), Store(), gates)


def test_bad_priors_are_named_before_training(trio: Path, tmp_path: Path, model: Any) -> None:
    same = changed(trio / "base", tmp_path / "same", Q0, None)
    with pytest.raises(AlignmentError, match="Δ is zero for every selected tensor"):
        make_prior(aligned(trio, same), minus="base")
    broken = changed(trio / "donor", tmp_path / "broken", Q0, float("nan"))
    with pytest.raises(WeightsError, match=r"q_proj\.weight of .*broken.*NaN"):
        make_prior(aligned(trio, broken))
    without = align(open_checkpoint(trio / "vlm"), open_checkpoint(trio / "donor"))
    with pytest.raises(AlignmentError, match="donor_base"):
        make_prior(without, minus="base")
    prior = exact(trio, PushRule())
    with pytest.raises(AlignmentError, match="is trained"):
        bind_prior(prior, model.requires_grad_(False))


def test_one_zero_delta_is_said(trio: Path, tmp_path: Path) -> None:
    base = load_file(trio / "base" / "model.safetensors")
    donor = tmp_path / "donor"
    shutil.copytree(trio / "donor", donor)
    tensors = load_file(donor / "model.safetensors") | {Q0: base[Q0]}
    save_file(tensors, donor / "model.safetensors", metadata={"format": "pt"})
    prior = make_prior(aligned(trio, donor), minus="base")
    assert Q0 not in prior.deltas
    assert {verdict.name: verdict.verdict for verdict in prior.verdicts}[Q0] == "zero"


def test_a_model_of_another_shape_is_refused(trio: Path, model: Any) -> None:
    layer = text_linears(model)["layers.0.self_attn.q_proj.weight"]
    layer.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(AlignmentError, match=r"shape \(3, 3\) in the role layers.0"):
        bind_prior(exact(trio, PushRule()), model)


def test_bound_is_a_record(trio: Path, model: Any) -> None:
    bound = bind_prior(exact(trio, PushRule()), model)
    assert isinstance(bound, Bound) and len(bound.verdicts) == len(bound.prior.verdicts)
