"""One push of DRIFT's prior on a model's gradients, against the naive formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.finetuning.naive_push import pushed
from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import AlignmentError, NumericalError, RecipeError
from vlmgraft.finetuning.delta import make_prior
from vlmgraft.finetuning.parameters import LowRank
from vlmgraft.finetuning.prior import Delta, Mode, Prior, PushRule
from vlmgraft.finetuning.push import Bound, bind_prior
from vlmgraft.hf.models import load_vlm
from vlmgraft.hf.modules import text_linears

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


@pytest.mark.parametrize("mode", get_args(Mode))
def test_modules_take_their_share_of_the_strength(trio: Path, model: Any, mode: Any) -> None:
    """The first entry that selects a tensor counts: .6 for queries, .2 for the rest of attention, none for norms."""
    shares = {"*.q_proj.weight": 3.0, "attention": 1.0, "norm": 0.0}
    prior = exact(trio, PushRule(mode, 0.2), shares=shares)
    with_gradients(model)
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    bind_prior(prior, model).push()
    for name, parameter in model.named_parameters():
        delta = prior.deltas.get(name.replace("model.language_model.", "model."))
        strength = 0.6 if "q_proj" in name else 0.0 if "norm" in name else 0.2
        expected = before[name] if delta is None else pushed(before[name], delta.value, PushRule(mode, strength))
        assert torch.allclose(parameter.grad, expected, atol=1e-5, rtol=1e-5), name


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


def test_a_model_of_another_shape_is_refused(trio: Path, model: Any) -> None:
    layer = text_linears(model)["layers.0.self_attn.q_proj.weight"]
    layer.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(AlignmentError, match=r"shape \(3, 3\) in the role layers.0"):
        bind_prior(exact(trio, PushRule()), model)


def test_bound_is_a_record(trio: Path, model: Any) -> None:
    bound = bind_prior(exact(trio, PushRule()), model)
    assert isinstance(bound, Bound) and len(bound.verdicts) == len(bound.prior.verdicts)


def test_a_model_that_trains_nothing_of_the_prior_is_refused(trio: Path, model: Any) -> None:
    with pytest.raises(AlignmentError, match="is trained"):
        bind_prior(exact(trio, PushRule()), model.requires_grad_(False))


def test_a_parameter_of_two_roles_is_pushed_once(model: Any) -> None:
    words = model.get_input_embeddings().weight
    model.lm_head.weight = words
    value = torch.ones_like(words)
    deltas = [
        Delta(role, role, "embeddings", value, float(value.norm()), 0.0, 1.0)
        for role in ("embed_tokens.weight", "lm_head.weight")
    ]
    bound = bind_prior(Prior(PushRule("absolute", 0.5), {delta.name: delta for delta in deltas}, ()), model)
    words.grad = torch.zeros_like(words)
    bound.push()
    assert torch.allclose(words.grad, torch.full_like(words, -0.5)) and len(bound.targets) == 1


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 8, 4))
        self.down_proj = torch.nn.Parameter(torch.randn(3, 4, 4))


def test_experts_one_by_one_are_pushed_in_their_part_of_the_fused_parameter(model: Any) -> None:
    """Each as if it were a parameter by itself; what has no Δ is left alone."""
    torch.manual_seed(0)
    model.model.language_model.layers[1].mlp.experts = fused = Experts()
    taus = {f"layers.1.mlp.experts.{expert}.{kind}.weight": torch.randn(4, 4)
            for expert, kind in ((0, "gate_proj"), (0, "up_proj"), (2, "up_proj"), (1, "down_proj"))}  # fmt: skip
    deltas = {f"model.{role}": Delta(f"model.{role}", role, "mlp", tau, float(tau.norm()), 0.5, 1.0)
              for role, tau in taus.items()}  # fmt: skip
    rule = PushRule("adaptive", 0.7)
    bound = bind_prior(Prior(rule, deltas, (), "device", {}), model)
    for parameter in fused.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {key: parameter.grad.clone() for key, parameter in fused.named_parameters()}
    bound.push()
    rows = {("gate_up_proj", 0, 0): (0, "gate_proj"), ("gate_up_proj", 0, 4): (0, "up_proj"),
            ("gate_up_proj", 2, 4): (2, "up_proj"), ("down_proj", 1, 0): (1, "down_proj")}  # fmt: skip
    for key, grads in before.items():
        for expert in range(3):
            for row in range(0, grads.shape[1], 4):
                after, grad = getattr(fused, key).grad[expert, row : row + 4], grads[expert, row : row + 4]
                if (key, expert, row) not in rows:
                    assert torch.equal(after, grad)
                    continue
                number, kind = rows[key, expert, row]
                tau = taus[f"layers.1.mlp.experts.{number}.{kind}.weight"]
                assert torch.allclose(after, pushed(grad, tau, rule), atol=1e-6), (key, expert, row)
    assert set(bound.moved()) == deltas.keys()
    with pytest.raises(AlignmentError, match=r"experts\.7\.up_proj.*no parameter"):
        wrong = Delta("model.layers.1.mlp.experts.7.up_proj.weight", "layers.1.mlp.experts.7.up_proj.weight",
                      "mlp", torch.ones(4, 4), 4.0, 0.0, 1.0)  # fmt: skip
        bind_prior(Prior(rule, {wrong.name: wrong}, (), "device", {}), model)
