"""Targets of DRIFT's push: a parameter, or a LoRA pair through its tangent; whole, or this process's shard of it.

If every process trains the whole parameter (DDP), one of them holds its Δ, pushes, and broadcasts its gradient.
"""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from vlmgraft.errors import RecipeError
from vlmgraft.finetuning.prior import Delta, Storage
from vlmgraft.hf.modules import ExpertSlice, role_of
from vlmgraft.storage.torchrun import process

Pieces = list[tuple[Tensor, Tensor]]

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:base_layer|modules_to_save\.[^.]+|_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\."
)


class _Held:
    """Δ of one tensor where it is pushed.

    holder: the process that pushes for all processes; None: each pushes what it trains. groups: process groups over
    which sums are reduced. copied: bytes of Δ that a push copies from the CPU, the same number in every process.
    """

    def __init__(
        self, delta: Delta, parameter: Tensor, store: Storage, value: Tensor | None, holder: int | None
    ) -> None:
        self.delta, self.holder = delta, holder
        self.groups = _groups(parameter, delta.name) if holder is None else (torch.distributed.group.WORLD,)
        self.away = holder is not None and holder != process()[0]
        if self.away:
            value = torch.empty(0, dtype=delta.value.dtype)
        self.direction = _placed(_shard(delta.value if value is None else value, parameter), parameter, store)
        elsewhere = store == "cpu" and _local(parameter.detach()).device.type != "cpu"
        parts = math.prod(torch.distributed.get_world_size(group) for group in self.groups) if holder is None else 1
        self.copied = delta.value.nbytes // parts if elsewhere else 0

    def _away(self, *gradients: Tensor | None) -> Pieces:
        """Empty pieces of these gradients: another process pushes them."""
        return [(grad.reshape(-1)[:0], self.direction.to(grad.device)) for grad in gradients if grad is not None]


class Dense(_Held):
    """A trained parameter and its Δ.

    whole_norm: ‖Δ‖ of the whole tensor. base: ⟨W, Δ⟩ at the VLM. part: the slice of fused experts that Δ is for. value:
    the whole Δ, if `delta` does not keep it; for a sharded parameter only this process's part is kept.
    """

    def __init__(
        self,
        delta: Delta,
        parameter: nn.Parameter,
        store: Storage,
        part: ExpertSlice | None = None,
        value: Tensor | None = None,
        holder: int | None = None,
    ) -> None:
        self.parameter, self.part = parameter, part
        if part is not None and isinstance(parameter, DTensor):
            raise RecipeError(
                f"{delta.name}: one of the experts that the model fuses, which are not pushed where they are sharded; "
                "leave experts out of prior.modules, or train in one process"
            )
        super().__init__(delta, parameter, store, value, holder)
        self.whole_norm = delta.norm
        self.base = delta.start

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [self.parameter]

    def has_gradient(self) -> bool:
        """Whether there is something to push."""
        return self.parameter.grad is not None

    def pieces(self) -> Pieces:
        """This process's (gradient, Δ), the gradient to be changed in place."""
        if self.parameter.grad is None:
            raise AssertionError("a target without a gradient")
        if self.away:
            return self._away(self.parameter.grad)
        grad = self._own(_local(self.parameter.grad))
        return [(grad, self.direction.to(grad.device, non_blocking=True))]

    def progress(self) -> Tensor:
        """⟨W, Δ⟩ over the part that this process holds."""
        weight = self._own(_local(self.parameter.detach()))
        if self.away:
            return weight.new_zeros((), dtype=torch.float64)
        return (weight.float() * self.direction.to(weight.device).float()).sum(dtype=torch.float64)

    def _own(self, tensor: Tensor) -> Tensor:
        """A view of the part of a parameter, or of its gradient, that Δ is for."""
        return tensor if self.part is None else self.part.of(tensor)


class LowRank(_Held):
    """The LoRA pair W = W₀ + c·B A: Δ is pulled back to the pair as c·Δ Aᵀ for B and c·Bᵀ Δ for A.

    That is the gradient of ⟨W, Δ⟩ with respect to the pair: the part of Δ in the adapter's tangent space is pushed, the
    rest cannot be. Norm and cosine are those of the pair as one vector. Δ is pulled back at every push, since A and B
    change.
    """

    whole_norm = 0.0  # it depends on A and B
    base = 0.0

    def __init__(
        self, delta: Delta, layer: Any, store: Storage, value: Tensor | None = None, holder: int | None = None
    ) -> None:
        adapter = _only_adapter(layer, delta.name)
        self.scaling = float(layer.scaling[adapter])
        self.A, self.B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if _groups(self.A, delta.name) or _groups(self.B, delta.name):
            raise RecipeError(
                f"{delta.name}: a sharded LoRA adapter is not pushed, since Δ would have to be gathered at every step; "
                "train the adapter under DDP, or all weights under FSDP2"
            )
        super().__init__(delta, self.A, store, value, holder)

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [self.A, self.B]

    def has_gradient(self) -> bool:
        """Whether there is something to push."""
        return self.A.grad is not None and self.B.grad is not None

    def pieces(self) -> Pieces:
        """(gradient, pulled-back Δ) of A and of B."""
        if self.away:
            return self._away(self.A.grad, self.B.grad)
        A, B = self.A.detach().float(), self.B.detach().float()
        direction = self.direction.to(A.device, non_blocking=True).float()
        return [(self.A.grad, self.scaling * (B.T @ direction)), (self.B.grad, self.scaling * (direction @ A.T))]

    def progress(self) -> Tensor:
        """⟨c·B A, Δ⟩."""
        if self.away:
            return self.A.new_zeros((), dtype=torch.float64)
        A, B = self.A.detach().float(), self.B.detach().float()
        return self.scaling * (B * (self.direction.to(A.device).float() @ A.T)).sum(dtype=torch.float64)


Target = Dense | LowRank


class Holders:
    """Which process holds which Δ if each trains the whole model: balanced by size, one process per parameter."""

    def __init__(self, model: nn.Module) -> None:
        sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        self._loads = [0] * (0 if sharded else process()[1])
        self._chosen: dict[int, int] = {}

    def of(self, owner: Any, delta: Delta) -> int | None:
        """The process for a parameter, or an adapter's layer; None if each process holds what it pushes."""
        if len(self._loads) < 2:
            return None
        holder = self._chosen.setdefault(id(owner), self._loads.index(min(self._loads)))
        self._loads[holder] += delta.value.nbytes
        return holder


def plain_role(name: str) -> str:
    """A parameter's name without the parts that peft, checkpointing, compilation and sharding add to it."""
    return _WRAPPERS.sub("", name)


def low_rank_layers(model: Any) -> dict[str, Any]:
    """Role of a weight → its peft LoRA layer; other kinds of adapters are left out."""
    peft: Any = sys.modules.get("peft.tuners.lora")  # a model that has LoRA layers has loaded it
    layers: dict[str, Any] = {}
    for name, module in model.named_modules() if peft is not None else ():
        match = re.search(r"(?:^|\.)(layers\.\d+\..+)$", plain_role(name + "."))
        if match and isinstance(module, peft.LoraLayer):
            layers[role_of(match[1] + "weight")] = module
    return layers


def _only_adapter(layer: Any, name: str) -> str:
    """The only active adapter; raises RecipeError for adapters without a plain tangent."""
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
    """This process's part of a whole tensor, sharded as the parameter is."""
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


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
