"""Memory of learning gates, computed from a model's config: weights, factors, gates, activations, logits, per GPU.

Activations are what autograd keeps for the backward pass, counted tensor by tensor for decoder layers of the Llama kind
(two RMS norms, grouped-query attention by a fused kernel, gated feed-forward); a test holds the count against what a
run keeps. Not counted: the allocator's slack, CUDA's own memory, communication buffers.

    python -m vlmgraft.training.memory Qwen/Qwen2.5-VL-7B-Instruct --ranks full 256 --tokens 8192 --gpus 8
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from vlmgraft.hf.models import text_experts, text_linears, text_model
from vlmgraft.training.projections import Backend, choose_backend

Rank = int | Literal["full"]

GATE_BYTES = 24
"""Per gate, float32: logit, gradient, two moments of Adam, σ(g) and the spectrum."""
LOGIT_BYTES = 14
"""Per answer token and word: the head's bfloat16 output, float32 logits, log-probabilities and their gradient."""


@dataclass(frozen=True)
class Shapes:
    """What the count needs of a model. projections: (name, out, in) of one decoder layer; the rest in parameters.

    experts: (experts, out, in) of one layer's stacks of fused experts, of which a token takes `active`.
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
        """From a transformers config, by building the model without memory."""
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        text = config.get_text_config(decoder=True)
        linears = text_linears(model)
        first = [(name.split(".")[-2], *one.weight.shape) for name, one in linears.items() if ".0." in name[:9]]
        stacks = [tuple(one.weight.shape) for name, one in text_experts(model).items() if ".0." in name[:9]]
        inside = {id(one) for module in text_model(model).layers for one in module.parameters()}
        whole = sum(one.numel() for one in model.parameters())
        layered = sum(one.numel() for one in model.parameters() if id(one) in inside)
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

    def width(self, name: str) -> int:
        """Output width of a projection by its last name; 0 where there is none."""
        return next((out for known, out, _ in self.projections if known == name), 0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. gathered: what sharding holds whole for a moment, two layers (one is fetched ahead)."""

    weights: int
    factors: int
    gathered: int
    gates: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory_of(
    shapes: Shapes,
    *,
    rank: Rank = "full",
    tokens: int = 8192,
    answer_tokens: int = 512,
    gpus: int = 1,
    checkpointing: bool = False,
    backend: Backend = "auto",
    width: int = 2,
) -> Memory:
    """Memory of one training step, in bytes on one of `gpus` GPUs.

    tokens: of a batch on one GPU, images and padding included; answer_tokens: those that count. rank: directions per
    matrix. backend: as `choose_backend` takes them for these tokens, or one for all. width: bytes of a weight or
    activation, 2 in bfloat16.
    """
    ranks = [min(out, inner) if rank == "full" else min(rank, out, inner) for _, out, inner in shapes.projections]
    per_layer = sum(r * (out + inner) for r, (_, out, inner) in zip(ranks, shapes.projections, strict=True))
    stacks = [(count, min(out, inner) if rank == "full" else min(rank, out, inner), out, inner)
              for count, out, inner in shapes.experts]  # fmt: skip
    per_layer += sum(count * r * (out + inner) for count, r, out, inner in stacks)
    gates = sum(ranks) + sum(count * r for count, r, _, _ in stacks)
    layer_bytes = width * (shapes.layer_parameters + per_layer)
    layer = _kept_per_layer(shapes, ranks, tokens, backend, width)
    norm = tokens * (4 * shapes.hidden + 4)  # the last one's; the first one's is not kept: no gradient goes below it
    kept = layer + shapes.layers * tokens * width * shapes.hidden + norm if checkpointing else shapes.layers * layer
    return Memory(
        weights=width * (shapes.layers * shapes.layer_parameters // gpus + shapes.other_parameters),
        factors=width * shapes.layers * per_layer // gpus,
        gathered=0 if gpus == 1 else 2 * layer_bytes,
        gates=GATE_BYTES * shapes.layers * gates,
        activations=kept,
        logits=LOGIT_BYTES * answer_tokens * shapes.vocabulary,
    )


_INPUTS = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "feed", "up_proj": "feed"}
"""Projections that read the same tensor."""


def _kept_per_layer(shapes: Shapes, ranks: Sequence[int], tokens: int, backend: Backend, width: int) -> int:
    """Bytes that autograd keeps for one decoder layer, frozen weights and factors aside."""
    queries, keys, feed = shapes.width("q_proj"), shapes.width("k_proj"), shapes.width("gate_proj")
    norms = 2 * (4 * shapes.hidden + 4)  # float32 inputs, and one over their root mean square
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
    # of every expert that a token takes: its inputs and outputs, and what lies between its two stacks
    per_token += 2 * width * shapes.active * sum(out + inner for _, out, inner in shapes.experts)
    return tokens * per_token + width * merged


def table(name: str, shapes: Shapes, ranks: Sequence[Rank], tokens: int, gpus: int) -> list[str]:
    """Rows of a Markdown table in GiB: by rank, on one GPU and sharded, with and without checkpointed layers."""
    rows = []
    for rank in ranks:
        for ways in dict.fromkeys((1, gpus)):
            plain = memory_of(shapes, rank=rank, tokens=tokens, gpus=ways)
            low = memory_of(shapes, rank=rank, tokens=tokens, gpus=ways, checkpointing=True)
            held = replace(plain, weights=plain.weights + plain.gathered, gathered=0)
            cells = [held.weights, held.factors, held.gates, held.activations, held.logits, held.total]
            figures = " | ".join(f"{cell / 2**30:.1f}" for cell in (*cells, low.activations, low.total))
            rows.append(f"| {name} | {rank} | {ways} | {figures} |")
    return rows


HEADER = (
    "| model | rank | GPUs | weights | factors | gates | activations | logits | total | activations, checkpointed "
    "| total, checkpointed |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Print the table for models whose config is at hand."""
    from vlmgraft.hf.models import load_config

    parser = argparse.ArgumentParser(description="Memory of learning gates per GPU, in GiB")
    parser.add_argument("models", nargs="+", help="folders or hub ids; only config.json is read")
    parser.add_argument("--ranks", nargs="+", default=["full", "1024", "256"])
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch, images included")
    parser.add_argument("--gpus", type=int, default=8)
    arguments = parser.parse_args()
    ranks: list[Rank] = ["full" if rank == "full" else int(rank) for rank in arguments.ranks]
    print(HEADER)
    for model in arguments.models:
        shapes = Shapes.of(load_config(model))
        print("\n".join(table(model.rstrip("/").split("/")[-1], shapes, ranks, arguments.tokens, arguments.gpus)))


if __name__ == "__main__":
    main()
