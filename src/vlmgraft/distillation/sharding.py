"""Frozen weights and factors sharded over the processes of a group (FSDP2), for models that do not fit one GPU.

Torch's `fully_shard` is used directly. accelerate's FSDP2 requires the optimiser's parameters inside the model, and it
shards embeddings and head behind hooks of the model's own forward pass. Here gates are one replicated vector outside of
the model, and training replays the text model alone. Decoder layers are sharded, with their factors; embeddings, head
and vision tower are replicated, because they are small and frozen.

A model is sharded before it answers, and again, on the same memory, when factors are added to its layers: while it
answers, no factors are gathered with the weights.

With offloading (torch's `CPUOffloadPolicy`), shards stay in host memory, page-locked if there is an accelerator, and
are on the device while their layer runs, forward and backward. A single process, in a group of its own, can then train
a model that is larger than its device's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmgraft.distillation.gated_layers import GatedLayers, swap_in
from vlmgraft.distillation.projections import Backend
from vlmgraft.hf.modules import Projection, is_shard, is_sharded, match_projections, parameter_of, text_model, unwrapped
from vlmgraft.spectral.factors import Factors


def shard(model: Any, device: torch.device | None = None, *, offload: bool = False) -> Any:
    """Shard the model in place by FSDP2, which gathers a layer to run it and frees it again. Layers are whole or, from
    `vlm_shards`, already shards, whose memory is reused. Every process of the group calls this.

    device: where layers run and everything else is placed, by default the model's device. offload: layers stay in host
    memory.
    """
    device, decoder = device or model.device, text_model(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if device != model.device:
        layers, decoder.layers = decoder.layers, nn.ModuleList()
        model.to(device)  # all but the layers
        decoder.layers = layers
    mesh = group_mesh(device)
    for layer in decoder.layers:
        _shard_layer(layer, mesh, offload)
    _tie(model, mesh)
    return model


def gate_and_shard(
    model: Any,
    projections: Mapping[str, Projection],
    factors: Mapping[str, Factors],
    backend: Backend = "auto",
    *,
    offload: bool = False,
) -> tuple[Any, GatedLayers]:
    """Swap in gated layers and shard, one decoder layer at a time; each process reads only its rows of U and Vh (for
    fused experts all rows, one layer at a time).

    This is permanent: a sharded model is not restored. If it is sharded already, its weights stay where they are, and a
    model of new modules is returned. All processes call this with the same arguments. offload: see `shard`.
    """
    if is_sharded(model):
        model = unwrapped(model)
        projections = match_projections(model, projections)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    gates, remaining, mesh = GatedLayers(), dict(projections), group_mesh(model.device)
    for layer in text_model(model).layers:
        inside = {id(module) for module in layer.modules()}
        here = {name: part for name, part in remaining.items() if id(parameter_of(part)[0]) in inside}
        remaining = {name: part for name, part in remaining.items() if name not in here}
        linear = {name: part.weight for name, part in here.items() if isinstance(part, nn.Linear)}
        gates.add(swap_in(model, here, OwnRows(factors, linear, mesh), backend)[0])
        _shard_layer(layer, mesh, offload)
    gates.add(swap_in(model, remaining, factors, backend)[0])  # raises for leftovers: projections are inside layers
    _tie(model, mesh)
    return model, gates


class OwnRows(Mapping[str, Factors]):
    """Factors with only this process's rows of U and Vh, as `fully_shard` splits them, for the projections in `like`
    (their weights, for device and dtype); other factors are whole. Files are memory-mapped: other rows are not read."""

    def __init__(self, factors: Mapping[str, Factors], like: Mapping[str, Tensor], mesh: Any) -> None:
        self.factors, self.like, self.mesh = factors, like, mesh

    def __getitem__(self, name: str) -> Factors:
        whole = self.factors[name]
        if name not in self.like:
            return whole
        return replace(whole, U=self._rows(whole.U, self.like[name]), Vh=self._rows(whole.Vh, self.like[name]))

    def _rows(self, whole: Tensor, like: Tensor) -> Tensor:
        parts, rank = whole.chunk(self.mesh.size()), self.mesh.get_local_rank()
        rows = parts[rank] if rank < len(parts) else whole[:0]
        return _shard_of(rows.to(like.device, like.dtype).contiguous(), self.mesh, whole.shape, (whole.shape[1], 1))

    def __iter__(self) -> Iterator[str]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)


def group_mesh(device: torch.device) -> Any:
    """A one-dimensional mesh of all processes of the group."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (torch.distributed.get_world_size(),))


def _shard_of(local: Tensor, mesh: Any, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """Wrap rows as this process's shard, in place: `DTensor.from_local` would move them to the mesh's device."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(shape, stride, local.dtype))
    return DTensor(local, spec, requires_grad=False)


def _shard_layer(layer: nn.Module, mesh: Any, offload: bool) -> None:
    """Apply `fully_shard`. Parameters that are shards already, or of a single offloading process, enter as meta tensors
    and are assigned afterwards: they are not copied, and offloaded ones are never on the device together."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    alone = offload and mesh.size() == 1
    shards = {name: parameter for name, parameter in layer.named_parameters() if alone or is_shard(parameter)}
    for name, parameter in shards.items():
        parent, _, key = name.rpartition(".")
        shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        setattr(layer.get_submodule(parent), key, nn.Parameter(shape, requires_grad=False))
    policy = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available()) if offload else OffloadPolicy()
    fully_shard(layer, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    own = {}
    for name, like in layer.named_parameters():
        if name in shards and isinstance(like, DTensor):
            part = shards[name]
            local = part.to_local() if is_shard(part) else part.detach()
            own[name] = _shard_of(local.cpu() if offload else local, mesh, like.shape, like.stride())
    layer.load_state_dict(own, strict=False, assign=True)


def _tie(model: Any, mesh: Any) -> None:
    """Apply `fully_shard` to the decoder, so that its layers are prefetched; it has no sharded parameter of its own."""
    from torch.distributed.fsdp import fully_shard

    decoder = text_model(model)
    rest = {parameter for name, parameter in decoder.named_parameters() if not name.startswith("layers.")}
    fully_shard(decoder, mesh=mesh, ignored_params=rest)
