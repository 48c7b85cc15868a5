"""What several gloo processes make, with weights replicated and sharded (FSDP2), is what one makes, bit for bit."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlmgraft.distillation import distributed
from vlmgraft.distillation.curvature import estimate_curvature
from vlmgraft.distillation.distill import Distiller
from vlmgraft.spectral.gate_store import load_gates
from vlmgraft.storage import torchrun
from vlmgraft.storage.torchrun import agreed, await_file, check_same

sys.path.insert(0, str(Path(__file__).parent))
from gloo import launch, torch_threads

OPTIONS: dict[str, Any] = {"steps": 6, "inject_weight": 0.1, "batches_per_step": 2}
SCRIPT = """
import gc, json, os, sys
from contextlib import contextmanager
from pathlib import Path
import torch
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # one tensor after the other
sys.path[:0] = [str(Path(sys.argv[1]).parent), sys.argv[1]]
import tiny_models as shared
from experiments.lab.models import build_processor, build_vlm
from safetensors.torch import save_file
from transformers import modeling_utils
from vlmgraft.distillation.curvature import estimate_curvature
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.distributed import join_group
from vlmgraft.storage.torchrun import agreed, barrier, check_same, process
from vlmgraft.distillation.sharding import shard
from vlmgraft.errors import VlmgraftError
from vlmgraft.hf.modules import is_shard
from vlmgraft.hf.sharded import vlm_shards
from vlmgraft.spectral.gate_store import save_gates
torch.set_num_threads(1)
def refused(call):
    try:
        call()
    except VlmgraftError as error:
        return str(error)
def places():
    # bytes by address, of tensors in memory; what is read is a view of the file as long as its dtype is the file's
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return {one.data_ptr(): one.nbytes for one in tensors if not (one.is_meta or is_shard(one))}
@contextmanager
def watched(facts):
    # bytes that each process reads from safetensors, and the most that this one holds meanwhile
    before, real, facts["peak"], read = set(places()), modeling_utils.safe_open, 0, []
    class Slice:
        def __init__(self, part): self.part = part
        def __getattr__(self, key): return getattr(self.part, key)
        def __getitem__(self, index):
            read.append(self.part[index].nbytes)
            now = sum(size for place, size in places().items() if place not in before)
            facts["peak"] = max(facts["peak"], now + read[-1])
            return self.part[index]
    class File:
        def __init__(self, *args, **kwargs): self.file = real(*args, **kwargs)
        def __getattr__(self, key): return getattr(self.file, key)
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def get_slice(self, name): return Slice(self.file.get_slice(name))
    modeling_utils.safe_open = File
    yield
    modeling_utils.safe_open = real
    facts["read"] = [None] * process()[1]
    torch.distributed.all_gather_object(facts["read"], sum(read))
def fail():
    raise VlmgraftError("no such state")
out, options = Path(sys.argv[2]), json.loads(sys.argv[3])
join_group()
rank = process()[0]
assert agreed(lambda: rank) == 0
assert "no such state" in refused(lambda: agreed(fail))
check_same("the weather", "mild")
assert "processes 0 and 1 differ in the weather" in refused(lambda: check_same("the weather", str(rank)))
def held(model):
    # numbers in this process's parameters
    return sum(p.to_local().numel() if is_shard(p) else p.numel() for p in model.parameters())
vlm = build_vlm(0).eval()
factors = shared.random_factors(vlm)
if rank == 0:
    vlm.save_pretrained(out / "vlm")
barrier()
for name in ("replicated", "offloaded", "sharded"):
    cache = None if name == "replicated" else out / f"teacher-{name}"
    facts = {}
    model = vlm
    if cache is not None:
        with watched(facts):
            model = vlm_shards(out / "vlm", torch.float32, torch.device("cpu"))
            model = shard(model, offload=name == "offloaded")
    facts["loaded"] = held(model)
    distiller = Distiller(model, build_processor(), factors, shared._image_questions(24),
                          shared._image_questions(12, first=1000), max_new_tokens=6, batch_size=12, cache=cache,
                          offload=name == "offloaded")
    fisher = estimate_curvature(distiller).h
    facts["estimated"] = held(distiller.model)
    gates = distiller.learn(**options)
    facts |= {"kl": distiller.keep_kl(gates), "held": held(distiller.model)}
    facts["answers"] = [distiller.targets.answers, distiller.held_out_targets.answers]
    if rank == 0:
        save_gates(gates, out / name)
        (out / f"{name}.json").write_text(json.dumps(facts))
        save_file(fisher, out / f"{name}.fisher")
        save_file({str(i): batch.target.log_p for i, batch in enumerate(distiller.targets.batches)}, out / f"{name}.p")
again = distiller.learn(**{**options, "gradient_checkpointing": True})
if rank == 0:
    save_gates(again, out / "checkpointed")
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_learn_the_gates_of_one(processes: int, distiller: Distiller, tmp_path: Path) -> None:
    (script := tmp_path / "learn.py").write_text(SCRIPT)
    launch([str(script), str(Path(__file__).parents[1]), str(tmp_path), json.dumps(OPTIONS)], processes)
    with torch_threads(1):
        alone, curvature = distiller.learn(**OPTIONS), estimate_curvature(distiller).h
    assert max(float(logits.abs().max()) for logits in alone.logits.values()) > 0.1
    names = ("replicated", "offloaded", "sharded")
    facts = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}
    for name in (*names, "checkpointed"):
        together = load_gates(tmp_path / name)
        for key, logits in alone.logits.items():
            assert torch.equal(together.logits[key], logits), (name, key)
        assert [row["kl"] for row in together.log] == [row["kl"] for row in alone.log]
    for found in facts.values():
        assert found["kl"] == pytest.approx(distiller.keep_kl(alone), rel=1e-3)
    for name, kind in product(("offloaded", "sharded"), ("fisher", "p")):  # the curvature, and what the teacher said
        assert facts[name]["answers"] == facts["replicated"]["answers"]
        of_whole, of_shards = (load_file(tmp_path / f"{one}.{kind}") for one in ("replicated", name))
        assert all(torch.equal(of_shards[key], value) for key, value in of_whole.items())
        assert kind == "p" or all(torch.equal(of_shards[key], value) for key, value in curvature.items())
    whole = sum(parameter.numel() for parameter in distiller.model.parameters())
    inside = sum(p.numel() for name, p in distiller.model.named_parameters() if ".language_model.layers." in name)
    factors = sum(one.U.numel() + one.Vh.numel() for one in distiller.factors.values())
    largest = max(parameter.numel() for parameter in distiller.model.parameters())
    assert sum(facts["sharded"]["read"]) == 4 * whole, "every byte is read once"
    share = 1 / processes + 0.01
    assert max(facts["sharded"]["read"]) <= share * 4 * whole, "its share by each"
    assert facts["sharded"]["peak"] <= 4 * (share * whole + largest), "and never more in memory, but for one tensor"
    assert facts["replicated"]["held"] == whole
    assert facts["sharded"]["loaded"] <= whole - inside + share * inside, "its share of the layers"
    assert facts["sharded"]["held"] <= whole - inside + share * (inside + factors), "and of the factors"
    assert facts["sharded"]["estimated"] == facts["sharded"]["held"], "the curvature takes the same rows"


def test_alone_everybody_agrees(tmp_path: Path) -> None:
    assert agreed(lambda: 3) == 3
    check_same("anything", "x")
    (tmp_path / "there").touch()
    await_file(tmp_path / "there", 60)
    await_file(tmp_path / "missing" / "file", 0.0)


def test_batches_are_shared_out_and_the_last_round_is_filled_with_work_that_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dealt = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "process", lambda rank=rank: (rank, 3))
        dealt.append(list(distributed.shared("abcdefg")))
    assert dealt[0] == [("a", 1.0), ("d", 1.0), ("g", 1.0)]
    assert dealt[1] == [("b", 1.0), ("e", 1.0), ("a", 0.0)]
    assert dealt[2] == [("c", 1.0), ("f", 1.0), ("a", 0.0)]


def test_a_process_alone_waits_for_nobody() -> None:
    torchrun.barrier()
    assert torchrun.process() == (0, 1) and list(distributed.shared("ab")) == [("a", 1.0), ("b", 1.0)]


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda:1", "cpu:gloo,cuda:nccl")])
def test_a_group_is_joined_where_torchrun_describes_one(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    for name in ("init_process_group", "barrier"):
        monkeypatch.setattr(
            torch.distributed, name, lambda *given, name=name, **more: calls.append((name, *given, more))
        )
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: calls.append(str(chosen)))
    monkeypatch.setattr(distributed, "default_device", lambda: torch.device(device))
    monkeypatch.setattr(distributed.atexit, "register", calls.append)
    monkeypatch.setattr(distributed, "rank_and_world", lambda: (0, 1))
    distributed.join_group()
    assert calls == [], "a process alone"
    monkeypatch.setattr(distributed, "rank_and_world", lambda: (1, 2))
    distributed.join_group()
    group = ("init_process_group", backend, {"timeout": timedelta(hours=2)})
    assert calls == [*(["cuda:1"] if device != "cpu" else []), group, distributed.leave_group]
    monkeypatch.setattr(distributed, "process", lambda: (1, 2))
    monkeypatch.setattr(torchrun, "process", lambda: (1, 2))
    monkeypatch.setattr(torchrun, "_group", lambda: torch.distributed)
    calls.clear()
    distributed.join_group()
    torchrun.barrier()
    assert calls == [("barrier", {})], "it is a member already, and waits for the other"
