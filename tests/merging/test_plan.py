"""The plan: its bytes are those that a merge moves, its work is linear, and it needs neither torch nor the weights."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from merge_builders import aligned, build, build_experts

from vlmgraft.alignment import Alignment, align
from vlmgraft.checkpoint.header import TensorInfo
from vlmgraft.checkpoint.index import Checkpoint
from vlmgraft.errors import AlignmentError
from vlmgraft.merging import MergePlan, merge_tensors, plan_merge
from vlmgraft.merging.plan import CHUNK
from vlmgraft.methods.task_arithmetic import TaskArithmetic


def headers(layers: int, key: str) -> Checkpoint:
    """A text model of `layers` layers, for the VLM with a tower beside it, that exists only as headers."""
    shapes = {"model.embed_tokens.weight": (20, 8), "model.norm.weight": (8,)}
    if key == "vlm":
        shapes["visual.patch_embed.proj.weight"] = (8, 8)
    for layer in range(layers):
        inside = f"model.layers.{layer}."
        shapes.update({f"{inside}self_attn.{x}_proj.weight": (8, 8) for x in "qkvo"})
        shapes.update({f"{inside}mlp.{x}_proj.weight": (8, 8) for x in ("gate", "up", "down")})
        shapes.update({f"{inside}{x}_layernorm.weight": (8,) for x in ("input", "post_attention")})
    file = Path(f"/nowhere/{key}/model.safetensors")
    found = {n: TensorInfo(n, "BF16", shape, file, 0, 2 * math.prod(shape)) for n, shape in shapes.items()}
    kind = "qwen2_vl" if key == "vlm" else "qwen2"
    return Checkpoint(file.parent, found, (file,), {"model_type": kind, "tie_word_embeddings": True})


def calls_of(run: Callable[[], Any]) -> int:
    """How many functions, of Python or C, `run` calls."""
    count = [0]

    def tick(_: Any, event: str, __: Any) -> None:
        count[0] += event in ("call", "c_call")

    sys.setprofile(tick)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count[0]


def test_work_is_linear_in_the_tensors() -> None:
    def run(layers: int) -> Callable[[], Any]:
        opened = [headers(layers, key) for key in ("vlm", "donor", "donor_base")]
        return lambda: plan_merge(align(*opened), TaskArithmetic())

    run(4)()  # caches of regular expressions
    small, large = calls_of(run(50)), calls_of(run(200))
    per_tensor = (large - small) / (150 * 9)
    assert large < 4.2 * small
    assert per_tensor < 400  # 50,000 tensors: 20 million calls at most, of some 50 ns each


def moved(alignment: Alignment, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes that a merge reads and writes."""
    read, written = [], []
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda *a: read.append(preadv(*a)) or read[-1])
    with monkeypatch.context() as inner:
        inner.setattr("vlmgraft.checkpoint.writer.os.pwrite", lambda *a: written.append(pwrite(*a)) or written[-1])
        merge_tensors(alignment, TaskArithmetic(0.5), out, shard_size=100_000)
    monkeypatch.undo()
    return sum(read), sum(written)


@pytest.mark.parametrize("builder", [build, build_experts])
def test_bytes_and_files_are_those_of_the_merge(
    builder: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder(tmp_path)
    alignment = aligned(tmp_path)
    plan = plan_merge(alignment, TaskArithmetic(0.5), 100_000, rate=1000)
    read, written = moved(alignment, tmp_path / "out", monkeypatch)
    files = list((tmp_path / "out").glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(file.open("rb").read(8), "little") for file in files)
    assert (plan.read, plan.written, plan.files) == (read, written - headers, len(files))
    assert plan.written == sum(info.nbytes for info in alignment.vlm.tensors.values())
    assert plan.seconds == (plan.read + plan.written) / 1000
    assert plan.merged + plan.kept + plan.excluded == len(alignment.vlm.tensors) and plan.merged == len(
        alignment.merged
    )


def test_memory_does_not_grow_with_the_model_unless_tensors_are_whole() -> None:
    def plan(layers: int, method: Any) -> MergePlan:
        opened = [headers(layers, key) for key in ("vlm", "donor", "donor_base")]
        return plan_merge(align(*opened), method)

    assert plan(2, TaskArithmetic()).memory == plan(20, TaskArithmetic()).memory < 150e6
    assert plan(2, WholeTensors()).memory > plan(2, TaskArithmetic()).memory > 2 * 3 * 4 * CHUNK


def test_a_method_with_passes_reads_the_merged_tensors_again() -> None:
    alignment = align(*(headers(3, key) for key in ("vlm", "donor", "donor_base")))
    once, thrice = plan_merge(alignment, TaskArithmetic()), plan_merge(alignment, ThreePasses())
    merged = sum(alignment.vlm.tensors[tensor.name].nbytes for tensor in alignment.merged)
    assert thrice.read == once.read + 3 * 3 * merged and thrice.written == once.written


def test_a_method_with_factors_of_its_own_reads_the_vlm_and_these() -> None:
    """U and Vh of full rank 8 and s, in float32, beside every merged matrix of 8 × 8 in bfloat16."""
    alignment = align(*(headers(3, key) for key in ("vlm", "donor", "donor_base")))
    plan = plan_merge(alignment, OwnUpdate())
    assert plan.read == alignment.vlm.nbytes + len(alignment.merged) * 4 * (8 * 8 + 8 + 8 * 8)


def test_refusals() -> None:
    alignment = align(headers(2, "vlm"), headers(2, "donor"))
    with pytest.raises(AlignmentError, match="donor_base: method task_arithmetic needs it"):
        plan_merge(alignment, TaskArithmetic())
    with pytest.raises(ValueError, match="shard_size 0"):
        plan_merge(alignment, TaskArithmetic(), 0)


def test_planning_loads_no_torch() -> None:
    code = "import sys, vlmgraft.merging, vlmgraft.methods; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@dataclass(frozen=True)
class WholeTensors(TaskArithmetic):
    whole_tensors: ClassVar = True


@dataclass(frozen=True)
class ThreePasses(TaskArithmetic):
    passes: ClassVar[int] = 3


@dataclass(frozen=True)
class OwnUpdate(TaskArithmetic):
    needs: ClassVar = frozenset()
    whole_tensors: ClassVar = True
    reads_sources: ClassVar = False
