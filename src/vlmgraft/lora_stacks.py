"""Fused experts in PEFT's adapter format, whose wrapped parameters nest: PEFT itself says what its tensors are called.

An adapter of a parameter [experts, out, in] holds every expert's own pair of factors, lora_A as [experts · rank, in]
with the expert first and lora_B as [out, rank · experts] with the expert last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vlmgraft.errors import RecipeError


def stack_keys(model: Any, modules: Sequence[str], stacks: Sequence[str], rank: int) -> dict[str, str]:
    """Path of a parameter (module and key) → prefix of its adapter's tensors.

    model: on the meta device; PEFT wraps it, so it serves for nothing else afterwards. modules: paths of the linear
    layers that the adapter also holds; stacks: those of the parameters. Raises RecipeError where peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:
        raise RecipeError(f"{stacks[0]}: experts need peft to be exported: pip install 'vlmgraft[tune]'") from None
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules), target_parameters=list(stacks))
    found = {}
    for name, module in get_peft_model(model, config).named_modules():
        if isinstance(module, ParamWrapper):
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{path}.{module.parameter_name}"] = name
    return found


def stack_tensors(
    A: Float[Tensor, "experts rank in"], B: Float[Tensor, "experts out rank"], inputs_first: bool
) -> tuple[Float[Tensor, "experts*rank in"], Float[Tensor, "out rank*experts"]]:
    """lora_A and lora_B of a stack whose update is B @ A per expert; `inputs_first`: the model keeps its parameter as
    [experts, in, out], so that what is out here is in to PEFT."""
    if inputs_first:
        A, B = B.mT, A.mT
    return A.reshape(-1, A.shape[-1]).contiguous(), B.permute(1, 2, 0).reshape(B.shape[1], -1).contiguous()
