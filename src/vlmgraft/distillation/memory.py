"""Memory of learning gates, computed from a model's config: weights, factors, gates, activations, logits, per GPU.

Activations are what autograd keeps for the backward pass, counted tensor by tensor for Llama-style decoder layers
(two RMS norms, grouped-query attention by a fused kernel, gated feed-forward); a test compares the count with what a
run keeps. Not counted: the allocator's slack, CUDA's own memory, communication buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch

from vlmgraft.distillation.projections import Backend, choose_backend
from vlmgraft.hf.modules import text_experts, text_linears, text_model

if TYPE_CHECKING:
    pass

Rank = int | Literal["full"]

GATE_BYTES = 24
"""Per gate, float32: logit, gradient, two moments of Adam, σ(g) and the spectrum."""
LOGIT_BYTES = 14
"""Per answer token and word: the head's bfloat16 output, float32 logits, log-probabilities and their gradient."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model that the count needs. projections: (name, out, in) of one decoder layer. layer_parameters,
    other_parameters: number of parameters in one decoder layer, and outside of the layers.
    experts: (experts, out, in) of one layer's stacks of fused experts, of which a token uses `active`.
    """

    layers: int
    layer_parameters: int
    other_parameters: int
    projections: tuple[tuple[str, int, int], ...]
    hidden: int
    heads: int
    vocabulary: int
    experts: tuple[tuple[int, int, int], ...] = ()
    active: int = 0

    @classmethod
    def of(cls, config: Any) -> Shapes:
        """From a transformers config, by building the model on the meta device."""
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        text = config.get_text_config(decoder=True)
        linears = text_linears(model)
        first = [(name.split(".")[-2], *linear.weight.shape) for name, linear in linears.items() if ".0." in name[:9]]
        stacks = [tuple(stack.weight.shape) for name, stack in text_experts(model).items() if ".0." in name[:9]]
        inside = {id(parameter) for layer in text_model(model).layers for parameter in layer.parameters()}
        whole = sum(parameter.numel() for parameter in model.parameters())
        layered = sum(parameter.numel() for parameter in model.parameters() if id(parameter) in inside)
        return cls(
            text.num_hidden_layers,
            layered // text.num_hidden_layers,
            whole - layered,
            tuple((name, out, inner) for name, out, inner in first),
            text.hidden_size,
            text.num_attention_heads,
            text.vocab_size,
            tuple((count, out, inner) for count, out, inner in stacks),
            getattr(text, "num_experts_per_tok", 0) if stacks else 0,
        )

    @property
    def stored(self) -> list[tuple[int, int, int]]:
        """(count, out, in) of the parameters of one layer: matrices, and stacks of experts."""
        return [*((1, out, inner) for _, out, inner in self.projections), *self.experts]

    def width(self, name: str) -> int:
        """Output width of a projection by its last name; 0 where there is none."""
        return next((out for projection, out, _ in self.projections if projection == name), 0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. gathered: what sharding holds unsharded at a time, two layers (one is prefetched); on a single
    GPU with offloaded layers, the layer that runs and the matrix that is being copied."""

    weights: int
    factors: int
    gathered: int
    gates: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum of all fields."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ((field.name, getattr(self, field.name) / 2**30) for field in fields(self))
        return ", ".join(f"{name} {size:.1f}" for name, size in parts)


def memory_of(
    shapes: Shapes,
    *,
    rank: Rank = "full",
    tokens: int = 8192,
    answer_tokens: int = 512,
    gpus: int = 1,
    checkpointing: bool = False,
    offload: bool = False,
    backend: Backend = "auto",
    width: int = 2,
) -> Memory:
    """Memory of one training step, in bytes on one of `gpus` GPUs.

    tokens: of a batch on one GPU, images and padding included; answer_tokens: those in the loss. rank: directions per
    matrix. offload: layers and factors are in host memory. backend: one for all layers, or "auto": the choice of
    `choose_backend` for this number of tokens. width: bytes of a weight or activation, 2 in bfloat16.
    """
    ranks = [min(out, inner) if rank == "full" else min(rank, out, inner) for _, out, inner in shapes.projections]
    per_layer = sum(r * (out + inner) for r, (_, out, inner) in zip(ranks, shapes.projections, strict=True))
    stacks = [(count, min(out, inner) if rank == "full" else min(rank, out, inner), out, inner)
              for count, out, inner in shapes.experts]  # fmt: skip
    per_layer += sum(count * r * (out + inner) for count, r, out, inner in stacks)
    gates = sum(ranks) + sum(count * r for count, r, _, _ in stacks)
    layer_bytes = width * (shapes.layer_parameters + per_layer)
    gathered = 0 if gpus == 1 else 2 * layer_bytes
    if offload:  # copied to the GPU: one matrix at a time, or a layer's shards
        gathered += layer_bytes + width * max(map(prod, shapes.stored)) if gpus == 1 else layer_bytes // gpus
    here = 0 if offload else shapes.layers
    layer = _kept_per_layer(shapes, ranks, tokens, backend, width)
    norm = tokens * (4 * shapes.hidden + 4)  # of the last norm; the first norm keeps nothing: no gradient goes below it
    kept = layer + shapes.layers * tokens * width * shapes.hidden + norm if checkpointing else shapes.layers * layer
    return Memory(
        weights=width * (here * shapes.layer_parameters // gpus + shapes.other_parameters),
        factors=width * here * per_layer // gpus,
        gathered=gathered,
        gates=GATE_BYTES * shapes.layers * gates,
        activations=kept,
        logits=LOGIT_BYTES * answer_tokens * shapes.vocabulary,
    )


def host_memory_of(shapes: Shapes, *, rank: Rank = "full", gpus: int = 1, width: int = 2) -> int:
    """Bytes of offloaded layers and factors in host memory, over all `gpus` processes. torch's allocator of page-locked
    memory rounds every matrix, U and Vh up to a power of two."""

    def locked(numbers: int) -> int:
        return gpus * (1 << (-(-width * numbers // gpus) - 1).bit_length())

    total, rest = 0, shapes.layer_parameters
    for count, out, inner in shapes.stored:
        r = min(out, inner) if rank == "full" else min(rank, out, inner)
        total += locked(count * out * inner) + (locked(count * out * r) + locked(count * inner * r) if r else 0)
        rest -= count * out * inner
    return shapes.layers * (total + width * rest)


_INPUTS = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "feed", "up_proj": "feed"}
"""Projections that read the same tensor."""


def _kept_per_layer(shapes: Shapes, ranks: Sequence[int], tokens: int, backend: Backend, width: int) -> int:
    """Bytes that autograd keeps for one decoder layer, without frozen weights and factors."""
    queries, keys, feed = shapes.width("q_proj"), shapes.width("k_proj"), shapes.width("gate_proj")
    norms = 2 * (4 * shapes.hidden + 4)  # float32 inputs, and the inverse of their root mean square
    attention = width * (2 * queries + 2 * keys) + 4 * shapes.heads  # q, k, v, output; log-sum-exp
    rotation = 2 * width * queries // shapes.heads  # cosines and sines
    inner, inputs, merged = 0, {}, 0
    for rank, (name, out, width_in) in zip(ranks, shapes.projections, strict=True):
        if choose_backend(tokens, (out, width_in), rank, backend) == "factored":
            inner += rank
        else:
            inputs[_INPUTS.get(name, name)] = width_in
            merged += out * width_in
    projections = width * (inner + sum(inputs.values()))
    per_token = norms + attention + rotation + projections + 3 * width * feed  # gate, silu(gate), up
    merged += sum(count * out * inner for count, out, inner in shapes.experts)  # always rebuilt
    # for each expert that a token uses: its inputs and outputs, and the activations between its two stacks
    per_token += 2 * width * shapes.active * sum(out + inner for _, out, inner in shapes.experts)
    return tokens * per_token + width * merged
