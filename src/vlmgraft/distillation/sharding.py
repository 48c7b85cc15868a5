"""Frozen weights and factors sharded over the processes of a group (FSDP2), for models that do not fit one GPU.

Torch's `fully_shard` is used directly. accelerate's FSDP2 wants the optimiser's parameters inside the model, and it
shards embeddings and head behind hooks of the model's own forward pass; gates are one replicated vector outside of it,
and training replays the text model alone. Decoder layers are sharded, with their factors; embeddings, head and vision
tower are replicated: they are small, and frozen.

A model is sharded before it answers, and once more, on the same memory, when factors join its layers: while it answers,
no factors are fetched with the weights.

Offloaded (torch's `CPUOffloadPolicy`), shards lie in the host's memory, page-locked where there is an accelerator, and
are on the device while their layer runs, forward and backward. One process in a group of its own then trains a model
that its device does not hold.
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
    """The model, whose layers FSDP2 gathers when they run and frees again; each held whole or, as `vlm_shards` gives
    them, in shards, whose memory is taken over. Every process of the group calls this.

    device: where layers run and all else is put, by default where the model is. offload: layers stay in the host's
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
    """Swap gated layers in and shard, one decoder layer after the other; each process reads its rows of U and Vh alone
    (of fused experts everything, a layer at a time).

    For good: a sharded model is not put back. Of one that is sharded already, the weights stay where they are, in new
    modules; that model is returned. Every process of the group calls this with the same arguments, offload as `shard`.
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
    gates.add(swap_in(model, remaining, factors, backend)[0])  # raises: every projection is inside a decoder layer
    _tie(model, mesh)
    return model, gates


class OwnRows(Mapping[str, Factors]):
    """Factors whose U and Vh are this process's rows, as `fully_shard` cuts them, for the projections in `like` (their
    weights, for device and dtype); the others whole. Files are mapped into memory: other rows are not read."""

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
    """All processes of the group, in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (torch.distributed.get_world_size(),))


def _shard_of(local: Tensor, mesh: Any, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """Rows as a process's shard, where they are: `DTensor.from_local` would move them to the mesh's device."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(shape, stride, local.dtype))
    return DTensor(local, spec, requires_grad=False)


def _shard_layer(layer: nn.Module, mesh: Any, offload: bool) -> None:
    """`fully_shard`; parameters that are shards already, as a process alone has them, are announced by their shape, and
    put in afterwards: they are not copied, and offloaded ones are never on the device together."""
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
    """Tie the layers together for prefetching: the decoder has no sharded parameter of its own."""
    from torch.distributed.fsdp import fully_shard

    decoder = text_model(model)
    rest = {parameter for name, parameter in decoder.named_parameters() if not name.startswith("layers.")}
    fully_shard(decoder, mesh=mesh, ignored_params=rest)
