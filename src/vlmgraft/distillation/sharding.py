"""Frozen weights and factors sharded over the processes of a group (FSDP2), for models that do not fit one GPU.

Torch's `fully_shard` is used directly. accelerate's FSDP2 wants the optimiser's parameters inside the model, and it
shards embeddings and head behind hooks of the model's own forward pass; gates are one replicated vector outside of it,
and training replays the text model alone. Decoder layers are sharded, with their factors; embeddings, head and vision
tower are replicated: they are small, and frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vlmgraft.distillation.gated_layers import GatedLayers, swap_in
from vlmgraft.distillation.projections import Backend
from vlmgraft.errors import RecipeError
from vlmgraft.hf.modules import Projection, parameter_of, text_model
from vlmgraft.spectral.factors import Factors


def gate_and_shard(
    model: Any, projections: Mapping[str, Projection], factors: Mapping[str, Factors], backend: Backend = "auto"
) -> GatedLayers:
    """Swap gated layers in and shard, one decoder layer after the other, so that only one layer's factors are whole.

    For good: a sharded model is not put back. Every process of the group calls this with the same arguments and a
    whole copy of the model on its device. Raises RecipeError when torch is too old to leave parameters out.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7):
        raise RecipeError(f"gates of several processes need torch 2.7 or newer, this is {torch.__version__}")
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    decoder, gates = text_model(model), GatedLayers()
    remaining = dict(projections)
    for layer in decoder.layers:
        inside = {id(module) for module in layer.modules()}
        here = {name: part for name, part in remaining.items() if id(parameter_of(part)[0]) in inside}
        remaining = {name: part for name, part in remaining.items() if name not in here}
        gates.add(swap_in(model, here, factors, backend)[0])
        fully_shard(layer, reshard_after_forward=True)
    gates.add(swap_in(model, remaining, factors, backend)[0])  # raises: every projection is inside a decoder layer
    rest = {parameter for name, parameter in decoder.named_parameters() if not name.startswith("layers.")}
    fully_shard(decoder, ignored_params=rest)  # no parameter of its own: it ties the layers together for prefetching
    return gates
