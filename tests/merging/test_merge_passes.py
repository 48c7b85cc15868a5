"""What a method's `prepare` sees, and that a merge streams the method it gives back."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_builders import KEYS, Tensors, aligned, build, build_experts, bytes_in, facts_in, tensors_in
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmgraft.alignment import assemble
from vlmgraft.errors import WeightsError
from vlmgraft.merging import merge_tensors
from vlmgraft.merging.pieces import AHEAD, in_order
from vlmgraft.merging.plan import CHUNK
from vlmgraft.methods.base import Passes, TensorContext
from vlmgraft.methods.task_arithmetic import TaskArithmetic

Seen = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Watcher(TaskArithmetic):
    """Keeps what every way through the passes shows, as whole flat tensors by name and checkpoint."""

    seen: Any = None

    def prepare(self, passes: Passes) -> TaskArithmetic:
        whole = {context.name: {key: load(key).flatten() for key in KEYS} for context, load in passes.tensors()}
        self.seen.update(tensors=whole, chunks=joined(list(passes.chunks())))
        self.seen["map"] = joined(passes.map(lambda chunk, _: {key: piece.clone() for key, piece in chunk.items()}))
        return TaskArithmetic(0.25)


def joined(rows: Any) -> Seen:
    parts: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for context, chunk in rows:
        for key, piece in chunk.items():
            assert context.start == sum(len(part) for part in parts[context.name][key]) and len(piece) <= CHUNK
            assert piece.dtype == torch.float32
            parts[context.name][key].append(piece)
    return {name: {key: torch.cat(one) for key, one in found.items()} for name, found in parts.items()}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("builder", [build, build_experts])
def test_all_ways_show_the_same_weights(builder: Any, threads: int, tmp_path: Path) -> None:
    builder(tmp_path)
    alignment, seen = aligned(tmp_path), {}
    merge_tensors(alignment, Watcher(1.0, seen), tmp_path / "out", threads=threads)
    merge_tensors(alignment, TaskArithmetic(0.25), tmp_path / "plain")
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "plain")
    assert facts_in(tmp_path / "out") == facts_in(tmp_path / "plain")
    held = {key: tensors_in(tmp_path / key) for key in KEYS}
    assert list(seen["map"]) == list(seen["chunks"]) == [tensor.name for tensor in alignment.merged]
    for tensor in alignment.merged:
        shape = held["vlm"][tensor.name].shape
        for key in KEYS:
            expected = held[key][tensor.name] if key == "vlm" else assembled(getattr(tensor, key), held[key], shape)
            for way in ("tensors", "chunks", "map"):
                assert torch.equal(seen[way][tensor.name][key], expected.float().flatten())


def assembled(source: Any, held: Tensors, shape: Any) -> Tensor:
    return assemble(source, held.__getitem__, tuple(shape))


@dataclass(frozen=True)
class Largest(TaskArithmetic):
    """Scales by one over the largest magnitude of all task vectors: wrong unless the pass saw all of them."""

    way: str = "map"

    def prepare(self, passes: Passes) -> TaskArithmetic:
        def top(chunk: Mapping[str, Tensor], _: TensorContext) -> float:
            return float((chunk["donor"] - chunk["donor_base"]).abs().max())

        if self.way == "map":
            return TaskArithmetic(1 / max(value for _, value in passes.map(top)))
        if self.way == "chunks":
            return TaskArithmetic(1 / max(top(chunk, context) for context, chunk in passes.chunks()))
        return TaskArithmetic(1 / max(top({key: load(key) for key in KEYS}, one) for one, load in passes.tensors()))


@pytest.mark.parametrize("way", ["map", "chunks", "tensors"])
def test_the_prepared_method_is_merged(way: str, tmp_path: Path) -> None:
    build(tmp_path)
    alignment = aligned(tmp_path)
    merge_tensors(alignment, Largest(way=way), tmp_path / "out")
    vlm, donor, base, out = (tensors_in(tmp_path / key) for key in (*KEYS, "out"))
    taus = {tensor.name: donor[tensor.name].float() - base[tensor.name].float() for tensor in alignment.merged}
    scale = 1 / max(float(tau.abs().max()) for tau in taus.values())
    for name, tau in taus.items():
        assert torch.equal(out[name], torch.add(vlm[name].float(), tau, alpha=scale).bfloat16())


@pytest.mark.parametrize("way", ["map", "chunks", "tensors"])
def test_passes_refuse_what_is_not_finite(way: str, tmp_path: Path) -> None:
    build(tmp_path)
    weights = load_file(tmp_path / "donor_base" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][-1, -1] = -math.inf
    save_file(weights, tmp_path / "donor_base" / "model.safetensors")
    with pytest.raises(WeightsError, match=r"up_proj.weight in .*\(donor_base\): holds NaN or infinity"):
        merge_tensors(aligned(tmp_path), Largest(way=way), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(KEYS)


def test_results_come_in_order_and_an_error_stops_the_rest() -> None:
    began: list[int] = []

    def work(task: int) -> int:
        began.append(task)
        time.sleep(0.001 * (task % 3))
        if task == 20:
            raise RuntimeError("task 20")
        return task * task

    with ThreadPoolExecutor(3) as pool:
        assert list(in_order(work, range(20), pool, 3)) == [task * task for task in range(20)]
        began.clear()
        with pytest.raises(RuntimeError, match="task 20"):
            list(in_order(work, iter(range(10_000)), pool, 3))
    assert len(began) < 20 + 3 * (AHEAD + 1) + 1
