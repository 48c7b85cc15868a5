"""What DRIFT pushes: a parameter, or a LoRA pair by way of its tangent; whole, or this process's shard of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from vlmgraft.errors import RecipeError
from vlmgraft.finetuning.prior import Delta, Storage
from vlmgraft.hf.modules import ExpertSlice, role_of

Pieces = list[tuple[Tensor, Tensor]]

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:base_layer|modules_to_save\.[^.]+|_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\."
)


class Dense:
    """A trained parameter and its Δ.

    groups: process groups over which sums are added up. whole_norm: ‖Δ‖ of the whole tensor. base: ⟨W, Δ⟩ at the VLM.
    copied: bytes of Δ that a push brings over from the CPU. part: where Δ is of one expert's matrix in the parameter.
    value: the whole Δ, where `delta` does not keep it; of a sharded parameter only this process's part stays.
    """

    def __init__(
        self,
        delta: Delta,
        parameter: nn.Parameter,
        store: Storage,
        part: ExpertSlice | None = None,
        value: Tensor | None = None,
    ) -> None:
        self.delta, self.parameter, self.part = delta, parameter, part
        self.groups = _groups(parameter, delta.name)
        if part is not None and isinstance(parameter, DTensor):
            raise RecipeError(
                f"{delta.name}: one of the experts that the model fuses, which are not pushed where they are sharded; "
                "leave experts out of prior.modules, or train in one process"
            )
        self.direction = _placed(_shard(delta.value if value is None else value, parameter), parameter, store)
        self.whole_norm = delta.norm
        self.base = delta.start
        self.copied = _copied(self.direction, parameter)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [self.parameter]

    def has_gradient(self) -> bool:
        """Whether there is something to push."""
        return self.parameter.grad is not None

    def pieces(self) -> Pieces:
        """This process's (gradient, Δ), the gradient to be changed in place."""
        if self.parameter.grad is None:
            raise AssertionError("a target without a gradient")
        grad = self._own(_local(self.parameter.grad))
        return [(grad, self.direction.to(grad.device, non_blocking=True))]

    def progress(self) -> Tensor:
        """⟨W, Δ⟩ of what this process holds."""
        weight = self._own(_local(self.parameter.detach()))
        return (weight.float() * self.direction.to(weight.device).float()).sum(dtype=torch.float64)

    def _own(self, tensor: Tensor) -> Tensor:
        """A view of what of the parameter, or of its gradient, belongs to Δ."""
        return tensor if self.part is None else self.part.of(tensor)


class LowRank:
    """The LoRA pair W = W₀ + c·B A: Δ is pulled back to the pair as c·Δ Aᵀ for B and c·Bᵀ Δ for A.

    That is the gradient of ⟨W, Δ⟩ with respect to the pair, so what of Δ lies in the adapter's tangent is pushed and
    the rest cannot be; norm and cosine are those of the pair as one vector. Δ is pulled back anew at every push, since
    A and B move.
    """

    groups: Sequence[Any] = ()
    whole_norm = 0.0  # not known before A and B are
    base = 0.0

    def __init__(self, delta: Delta, layer: Any, store: Storage, value: Tensor | None = None) -> None:
        adapter = _only_adapter(layer, delta.name)
        self.delta, self.scaling = delta, float(layer.scaling[adapter])
        self.A, self.B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if _groups(self.A, delta.name) or _groups(self.B, delta.name):
            raise RecipeError(
                f"{delta.name}: a sharded LoRA adapter is not pushed, since Δ would have to be gathered at every step; "
                "train the adapter under DDP, or all weights under FSDP2"
            )
        self.direction = _placed(delta.value if value is None else value, self.A, store)
        self.copied = _copied(self.direction, self.A)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [self.A, self.B]

    def has_gradient(self) -> bool:
        """Whether there is something to push."""
        return self.A.grad is not None and self.B.grad is not None

    def pieces(self) -> Pieces:
        """(gradient, pulled-back Δ) of A and of B."""
        A, B = self.A.detach().float(), self.B.detach().float()
        direction = self.direction.to(A.device, non_blocking=True).float()
        return [(self.A.grad, self.scaling * (B.T @ direction)), (self.B.grad, self.scaling * (direction @ A.T))]

    def progress(self) -> Tensor:
        """⟨c·B A, Δ⟩."""
        A, B = self.A.detach().float(), self.B.detach().float()
        return self.scaling * (B * (self.direction.to(A.device).float() @ A.T)).sum(dtype=torch.float64)


Target = Dense | LowRank


def plain_role(name: str) -> str:
    """A parameter's name without what peft, checkpointing, compiling and sharding put into it."""
    return _WRAPPERS.sub("", name)


def low_rank_layers(model: Any) -> dict[str, Any]:
    """Role of a weight → its peft LoRA layer; other kinds of adapters are not among them."""
    peft: Any = sys.modules.get("peft.tuners.lora")  # a model that has LoRA layers has loaded it
    layers: dict[str, Any] = {}
    for name, module in model.named_modules() if peft is not None else ():
        match = re.search(r"(?:^|\.)(layers\.\d+\..+)$", plain_role(name + "."))
        if match and isinstance(module, peft.LoraLayer):
            layers[role_of(match[1] + "weight")] = module
    return layers


def sharded_over(parameter: Tensor) -> bool:
    """Whether other processes hold parts of this parameter."""
    return bool(_groups(parameter, "parameter"))


def _only_adapter(layer: Any, name: str) -> str:
    """The one adapter that is trained; refuses what has no plain tangent."""
    active = list(layer.active_adapters)
    if len(active) != 1 or active[0] not in layer.lora_A:
        raise RecipeError(f"{name}: adapters {active} are active; the push is for one LoRA adapter of a linear layer")
    if active[0] in layer.lora_variant or layer.fan_in_fan_out:
        raise RecipeError(
            f"{name}: DoRA, other variants and transposed layers are not W₀ + c·B A, so Δ has no such pull-back; use "
            "plain LoRA"
        )
    return str(active[0])


def _groups(parameter: Tensor, name: str) -> tuple[Any, ...]:
    """The process groups over which a DTensor is sharded; none for a plain tensor."""
    if not isinstance(parameter, DTensor):
        return ()
    if any(type(placement) not in (Replicate, Shard) for placement in parameter.placements):
        raise RecipeError(
            f"{name}: sharded as {parameter.placements}; the push knows even Shard and Replicate "
            "placements (FSDP2, HSDP, TP)"
        )
    mesh: Any = parameter.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(parameter.placements) if type(placement) is Shard)


def _shard(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as the parameter is."""
    if not isinstance(parameter, DTensor):
        return value
    mesh: Any = parameter.device_mesh
    whole = value.to(mesh.device_type)
    return distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None).to_local().clone()


def _placed(value: Tensor, parameter: Tensor, store: Storage) -> Tensor:
    device = _local(parameter.detach()).device
    if store == "device" or device.type == "cpu":
        return value.to(device)
    value = value.cpu()
    return value.pin_memory() if torch.cuda.is_available() else value


def _copied(direction: Tensor, parameter: Tensor) -> int:
    device = _local(parameter.detach()).device
    return 0 if direction.device == device else direction.numel() * direction.element_size()


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
