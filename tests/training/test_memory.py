"""The memory count against what a run of the lab's model keeps for its backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmgraft.training.distill import Distiller
from vlmgraft.training.gate_vector import GateVector
from vlmgraft.training.gated import checkpointed, gated
from vlmgraft.training.memory import GATE_BYTES, Memory, Shapes, memory_of, table


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
