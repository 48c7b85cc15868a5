"""What a push sees of a parameter and of a LoRA pair, against autograd and plain sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from vlmgraft.errors import RecipeError
from vlmgraft.finetuning.parameters import Dense, LowRank, low_rank_layers, plain_role
from vlmgraft.finetuning.prior import Delta


def delta_of(value: torch.Tensor, start: float = 0.0) -> Delta:
    return Delta("w", "layers.0.q.weight", "attention", value, float(value.norm()), start, 1.0)


class Tiny(nn.Module):
    """One layer where a decoder has its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(5, 4, bias=False)})])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers[0]["q"](inputs)  # type: ignore[index, no-any-return, operator]


def adapted(**options: Any) -> tuple[Any, Any]:
    """A LoRA model and its only layer, with a B that is not zero."""
    torch.manual_seed(0)
    model = get_peft_model(Tiny(), LoraConfig(r=2, lora_alpha=6, target_modules=["q"], **options))
    layer = low_rank_layers(model)["layers.0.q.weight"]
    nn.init.normal_(layer.lora_B["default"].weight)
    return model, layer


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("layers.0.self_attn.q_proj.base_layer.weight", "layers.0.self_attn.q_proj.weight"),
        ("layers.0._checkpoint_wrapped_module.mlp._orig_mod.up.weight", "layers.0.mlp.up.weight"),
        ("_fsdp_wrapped_module.layers.1.norm.weight", "layers.1.norm.weight"),
        ("lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("my_base_layer.weight", "my_base_layer.weight"),
    ],
)
def test_the_names_of_wrappers_go(name: str, role: str) -> None:
    assert plain_role(name) == role


def test_a_whole_parameter() -> None:
    value, weight = torch.randn(3, 2), nn.Parameter(torch.randn(3, 2))
    target = Dense(delta_of(value, start=2.0), weight, "device")
    assert not target.has_gradient() and not target.groups and target.copied == 0
    with pytest.raises(AssertionError):
        target.pieces()
    (weight * torch.ones(3, 2)).sum().backward()
    ((grad, direction),) = target.pieces()
    assert grad is weight.grad and direction.equal(value) and target.parameters() == [weight]
    by_hand = sum(float(w) * float(d) for w, d in zip(weight.detach().flatten(), value.flatten(), strict=True))
    assert float(target.progress()) == pytest.approx(by_hand, rel=1e-5) and target.base == 2.0


def test_a_pair_is_pushed_along_what_autograd_says_of_the_product() -> None:
    _, layer = adapted()
    value = torch.randn(4, 5)
    target = LowRank(delta_of(value), layer, "device")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    along = torch.autograd.grad((3.0 * (B @ A) * value).sum(), (A, B))  # alpha 6, rank 2: c = 3
    assert not target.has_gradient()
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    pieces = target.pieces()
    assert [grad for grad, _ in pieces] == [A.grad, B.grad] and target.has_gradient()
    assert all(torch.allclose(mine, theirs, atol=1e-5) for (_, mine), theirs in zip(pieces, along, strict=True))
    assert float(target.progress()) == pytest.approx(float((3.0 * (B @ A) * value).sum().detach()), rel=1e-5)


def test_adapters_without_a_plain_tangent_are_refused() -> None:
    model, layer = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q"]))
    layer.set_adapter(["default", "second"])
    with pytest.raises(RecipeError, match=r"w: adapters \['default', 'second'\] are active"):
        LowRank(delta_of(torch.ones(4, 5)), layer, "device")
    with pytest.raises(RecipeError, match="DoRA"):
        LowRank(delta_of(torch.ones(4, 5)), adapted(use_dora=True)[1], "device")
