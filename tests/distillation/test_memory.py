"""The memory count against what a run of the lab's model keeps for its backward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from docs.tools.memory_table import table
from vlmgraft.distillation import memory
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.gate_vector import GateVector
from vlmgraft.distillation.gated_layers import checkpointed, gated
from vlmgraft.distillation.memory import (
    GATE_BYTES,
    Kept,
    Memory,
    Shapes,
    host_memory_of,
    memory_of,
    offloads,
    way_that_fits,
    ways_of,
)
from vlmgraft.errors import RecipeError
from vlmgraft.hf.batches import Question, encode
from vlmgraft.hf.models import load_config, load_processor
from vlmgraft.methods.calibration import Calibration
from vlmgraft.methods.curvature import Curvature
from vlmgraft.methods.frism import Frism


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


def test_it_fits_where_nine_tenths_of_the_memory_hold_it() -> None:
    ways = [(False, False), (True, False)]
    plain, low = (memory_of(SHAPES, rank=4, tokens=10, checkpointing=first).total for first, _ in ways)
    chosen = [way_that_fits(ways, SHAPES, size / 0.9, rank=4, tokens=10) for size in (plain + 1, low + 1, low - 1)]
    assert low < plain and chosen == [(False, False), (True, False), None]


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


def test_ways_that_a_recipe_allows() -> None:
    auto, never = Frism(), Frism(gradient_checkpointing=True, offload=False)
    assert ways_of(auto, True) == [(False, False), (True, False), (False, True), (True, True)]
    assert ways_of(auto, False) == [(False, False), (True, False)]
    assert ways_of(never, True) == [(True, False)]
    assert ways_of(Frism(gradient_checkpointing=False, offload=True), False) == [(False, True)]
    assert ways_of(Curvature(gradient_checkpointing=False), True) == [(False, False), (False, True)]


def test_bytes_that_are_kept_of_questions_by_hand() -> None:
    """Of two prompts of 10 and 30 tokens with answers of 5: rows of 8 numbers, three times as many with two more of
    Qwen3-VL's layers; distributions of 100 words whole, of 5,000 as 64 and a rest, with 64 ids."""
    config: Any = SimpleNamespace(hidden_size=8, vocab_size=100, get_text_config=lambda decoder: config)
    calibration = Calibration("none.jsonl", max_new_tokens=5)
    assert Kept.of(config, calibration, [10, 30], 2) == Kept(40 * 16 + 10 * 400, 50 * 16 + 10 * 400)
    config.vision_config = SimpleNamespace(deepstack_visual_indexes=[1, 2])
    config.vocab_size = 5000
    assert Kept.of(config, calibration, [10, 30], 2) == Kept(40 * 48 + 10 * 516, 50 * 48 + 10 * 516)
    served = Kept.of(config, replace(calibration, endpoint="http://h/v1", tokens="all"), [10, 30], 2)
    assert served == Kept(50 * 516, 50 * 48 + 50 * 516)


def test_what_a_folder_holds_already_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gates.teacher"
    monkeypatch.setattr(memory, "disk_of", lambda folder: (folder.parent, 60))
    with pytest.raises(RecipeError, match=r"gates.teacher: image features and answers take"):
        Kept(100, 0).check(folder)
    (folder / "key").mkdir(parents=True)
    (folder / "key" / "answers-0000.safetensors").write_bytes(bytes(40))
    assert "free in" in Kept(100, 0).check(folder)


LONG, SHORT = Question("what is it?" * 9), Question("what?")


@pytest.mark.parametrize(
    ("offload", "device", "size", "expected"),
    [
        (True, "cpu", 0, True),
        (False, "cuda", 0, False),
        ("auto", "cpu", 0, False),
        ("auto", "cuda", 1.0, False),  # checkpointed, the longest question's batches just fit
        ("auto", "cuda", 0.99, True),
        ("auto", "cuda", 0.01, True),  # nothing fits
    ],
)
def test_it_is_decided_before_models_are_loaded(
    offload: Any, device: str, size: float, expected: bool, trio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, processor = Shapes.of(load_config(trio / "vlm")), load_processor(trio / "vlm")
    length = encode(processor, [LONG])["input_ids"].shape[1] + 64
    needed = memory_of(shapes, rank=16, tokens=2 * length, answer_tokens=2 * 64, checkpointing=True)
    properties = SimpleNamespace(total_memory=size * needed.total / 0.9 + 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    method = Frism(rank=16, offload=offload, calibration=Calibration("none.jsonl", batch_tokens=2 * length + 1))
    asked = [SHORT] * 8 + [LONG] + [SHORT] * 8
    assert offloads(method, trio / "vlm", asked, torch.device(device), torch.bfloat16) is expected
