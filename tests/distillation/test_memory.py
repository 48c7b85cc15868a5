"""The memory count against what a run of the lab's model keeps for its backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from docs.tools.memory_table import table
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.gate_vector import GateVector
from vlmgraft.distillation.gated_layers import checkpointed, gated
from vlmgraft.distillation.memory import (
    GATE_BYTES,
    Memory,
    Shapes,
    host_memory_of,
    memory_of,
)


def kept(distiller: Distiller, backend: Any, checkpointing: bool) -> int:
    """Bytes of distinct storages that autograd keeps between the passes, parameters and what was there before aside."""
    model, batch = distiller.model, distiller.targets.batches[0]
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with gated(model, distiller.linears, distiller.factors, backend) as layers, checkpointed(model, checkpointing):
        vector = GateVector(distiller.factors)
        layers.set(vector.spectra(1.0)[0])
        before = {one.untyped_storage().data_ptr() for one in (*model.parameters(), vector.logits, vector.s)}
        before |= {one.untyped_storage().data_ptr() for one in tensors((batch.captured, batch.target.log_p))}
        before |= {
            layer.spectrum.untyped_storage().data_ptr() for layer in layers.values() if layer.spectrum is not None
        }
        hidden: list[torch.Tensor] = []
        head = model.lm_head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            batch.kl(model)
        head.remove()
        rows = len(hidden[0])
    everything = sum(one.nbytes() for place, one in storages.items() if place not in before)
    logits = 4 * rows * model.config.get_text_config().vocab_size
    return everything - logits


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["factored", "rebuilt"])
def test_the_count_is_what_a_run_keeps(distiller: Distiller, backend: Any, checkpointing: bool) -> None:
    shapes = Shapes.of(distiller.model.config)
    tokens = distiller.targets.batches[0].tokens()
    given: dict[str, Any] = {"tokens": tokens, "width": 4, "checkpointing": checkpointing}
    expected = memory_of(shapes, **given, backend=backend).activations
    measured = kept(distiller, backend, checkpointing)
    if checkpointing:  # the layer that is run again keeps nothing yet, and the first one's input was there before
        whole = memory_of(shapes, **{**given, "checkpointing": False}, backend=backend).activations
        expected -= whole // shapes.layers + 4 * tokens * shapes.hidden
    assert measured == pytest.approx(expected, rel=0.08)


def test_weights_factors_and_gates_are_those_of_the_run(distiller: Distiller) -> None:
    found = memory_of(Shapes.of(distiller.model.config), width=4)
    assert found.weights == 4 * sum(one.numel() for one in distiller.model.parameters())
    assert found.factors == 4 * sum(one.U.numel() + one.Vh.numel() for one in distiller.factors.values())
    assert found.gates == GATE_BYTES * sum(len(one.s) for one in distiller.factors.values())


def test_sharding_and_rank_save_what_they_should(distiller: Distiller) -> None:
    shapes = Shapes.of(distiller.model.config)
    one, eight = (memory_of(shapes, gpus=gpus) for gpus in (1, 8))
    assert one.gathered == 0 < eight.gathered and eight.gates == one.gates
    assert eight.factors == one.factors // 8 and eight.activations == one.activations
    assert memory_of(shapes, tokens=64).activations == memory_of(shapes, tokens=64, backend="factored").activations
    low = memory_of(shapes, rank=16)
    assert low.factors < one.factors / 4 and low.activations < one.activations
    assert isinstance(one, Memory) and one.total == sum(vars(one).values())
    assert len(table("lab", shapes, ["full", 16], 1024, 8)) == 4


SHAPES = Shapes(2, 1000, 500, (("q_proj", 8, 8), ("k_proj", 4, 8), ("gate_proj", 16, 8)), 8, 2, 100, ((3, 6, 8),), 2)
"""Two layers of 1,000 parameters and 500 others; hidden 8, 2 heads, 100 words; 3 experts [6, 8], of which a token
takes 2."""


def test_bytes_by_hand() -> None:
    """Rank 4: 64 + 48 + 96 numbers of factors for the matrices and 3 · 4 · 14 for the experts; 12 + 12 gates."""
    memory = memory_of(SHAPES, rank=4, tokens=10, answer_tokens=5)
    assert memory.weights == 2 * (2 * 1000 + 500) and memory.factors == 2 * 2 * (208 + 168)
    assert memory.gates == 24 * 2 * (12 + 12) and memory.logits == 14 * 5 * 100 and memory.gathered == 0
    two = memory_of(SHAPES, rank=4, tokens=10, answer_tokens=5, gpus=2)
    assert two.gathered == 2 * 2 * (1000 + 376) and two.weights == 2 * (1000 + 500) and two.factors == 2 * 376
    assert memory_of(SHAPES, rank=4, width=4).weights == 2 * memory.weights
    assert Shapes(*list(vars(SHAPES).values())[:-2]).experts == () and memory_of(SHAPES).gates == 24 * 2 * (20 + 18)


@pytest.mark.parametrize(
    ("backend", "per_token", "once"),
    [
        # norms 72, q k v and output 48 + 8, rotation 16, gate and up 96, experts 112; directions or inputs; rebuilt
        ("factored", 72 + 56 + 16 + 96 + 112 + 2 * (4 + 4 + 4), 2 * 3 * 6 * 8),
        ("rebuilt", 72 + 56 + 16 + 96 + 112 + 2 * (8 + 8), 2 * (3 * 6 * 8 + 64 + 32 + 128)),
    ],
)
def test_activations_by_hand(backend: Any, per_token: int, once: int) -> None:
    layer = 10 * per_token + once
    assert memory_of(SHAPES, rank=4, tokens=10, backend=backend).activations == 2 * layer
    low = memory_of(SHAPES, rank=4, tokens=10, backend=backend, checkpointing=True)
    assert low.activations == layer + 2 * 10 * 2 * 8 + 10 * (4 * 8 + 4)


def test_offloaded_bytes_by_hand() -> None:
    """On the card what is in no layer, the layer that runs and the largest matrix, the first stack of experts; of two
    cards two layers and the shards of one. In the host's memory a power of two each: W 64 + 32 + 128 and 3 · 48
    numbers, U 32 + 16 + 64 and 72, Vh 32 + 32 + 32 and 96 (rank 4)."""
    alone, both = (memory_of(SHAPES, rank=4, tokens=10, offload=True, gpus=gpus) for gpus in (1, 2))
    assert alone.weights == both.weights == 2 * 500 and alone.factors == both.factors == 0
    assert alone.gathered == 2 * (1000 + 376 + 3 * 6 * 8) and both.gathered == 2 * 2 * 1376 + 1376
    assert alone.activations == memory_of(SHAPES, rank=4, tokens=10).activations
    powers = 128 + 64 + 256 + 512 + 64 + 32 + 128 + 256 + 64 + 64 + 64 + 256
    rest = 2 * (1000 - 64 - 32 - 128 - 3 * 48)
    assert host_memory_of(SHAPES, rank=4) == 2 * (powers + rest)
    assert host_memory_of(SHAPES, rank=0) == 2 * (128 + 64 + 256 + 512 + rest)
    thirds = 3 * (64 + 32 + 128 + 128)  # 43, 22, 86 and 96 bytes
    assert host_memory_of(SHAPES, rank=0, gpus=3) == 2 * (thirds + rest)
