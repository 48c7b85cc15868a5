"""Two gloo processes, replicated or sharded, make the steps of one, and hold no more of Δ than they push."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = """
import gc
import sys
from dataclasses import replace
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from vlmgraft.alignment import align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.hf.models import load_vlm
from vlmgraft.hf.modules import text_model
from vlmgraft.finetuning.push import bind_prior
from vlmgraft.finetuning.callback import DriftCallback
from vlmgraft.finetuning.prior import PushRule
from vlmgraft.finetuning.delta import make_prior
from vlmgraft.storage.torchrun import leave_group

how, trio, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
alignment = align(open_checkpoint(trio / "vlm"), open_checkpoint(trio / "donor"), modules=["attention", "norm"])
dtype = torch.bfloat16  # of no other tensor in this process
prior = make_prior(alignment, PushRule("adaptive", 1.0), dtype=dtype)
if how == "whole":  # as if one process had made it: all values are kept
    with prior.values() as value_of:
        deltas = {name: replace(delta, value=value_of(name)) for name, delta in prior.deltas.items()}
    prior = replace(prior, deltas=deltas, opened=None)
ids = torch.randint(10, 60, (16, 6), generator=torch.Generator().manual_seed(0)).tolist()
rows = [{"input_ids": row, "labels": row, "attention_mask": [1] * 6} for row in ids]
collate = lambda rows: {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
model = load_vlm(trio / "vlm", torch.float32)
if how.startswith("lora"):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r".*language_model.*(q|k|v|o)_proj", init_lora_weights="gaussian")
    model = get_peft_model(model, config)

def finish(weights, said):
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        save_file({name: value.contiguous().clone() for name, value in weights.items()}, out / f"{how}.safetensors")
        (out / f"{how}.txt").write_text(said)
    leave_group()

def shown(bound):
    moved = bound.moved()
    return "\\n".join(f"{name} {bound.last[name][0]:.5f} {bound.last[name][1]:.5f} {moved[name]:.6f}" for name in moved)

def count(bound, rank, mine):
    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) is torch.Tensor and value.dtype == dtype]
    stores = [value.untyped_storage() for value in tensors if value.device.type != "meta"]
    stores = {store.data_ptr(): store.nbytes() // dtype.itemsize for store in stores if store.nbytes()}
    pushed = {target.delta.name for target in bound.targets}
    whole = sum(delta.value.numel() for delta in prior.deltas.values() if delta.name in pushed)
    (out / f"{how}.{rank}.held").write_text(f"{sum(stores.values())} {mine} {whole}")

if how in ("one", "ddp", "lora-one", "lora-ddp"):
    size = 4 if how.endswith("one") else 2
    arguments = TrainingArguments(out / how, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant",
        per_device_train_batch_size=size, gradient_accumulation_steps=2, max_grad_norm=0.5, logging_steps=1,
        train_sampling_strategy="sequential", report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        num_train_epochs=1, ddp_find_unused_parameters=True)
    callback = DriftCallback(prior)
    trainer = Trainer(model, arguments, collate, train_dataset=rows, callbacks=[callback])
    trainer.train()
    bound = callback.bound
    if how.endswith("ddp"):
        rank = torch.distributed.get_rank()
        count(bound, rank, sum(target.delta.value.numel() for target in bound.targets if target.holder == rank))
    finish({name: value for name, value in model.named_parameters() if value.requires_grad}, shown(bound))
else:
    from types import SimpleNamespace
    class Sync:  # what the trainer's optimiser says
        sync_gradients = False
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for layer in text_model(model).layers:
        fully_shard(layer)
    fully_shard(model)
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    optimiser.gradient_state, optimiser.scaler = Sync, None  # as accelerate wraps it
    optimiser.accelerator_state = SimpleNamespace(distributed_type="DistributedType.FSDP")
    callback = DriftCallback(prior, log=out / "fsdp.jsonl")
    Space = SimpleNamespace
    state = Space(global_step=0, max_steps=2, is_world_process_zero=rank == 0)
    arguments = Space(output_dir=out, deepspeed=None, fsdp=None)
    callback.on_train_begin(arguments, state, None, model=model, optimizer=optimiser)
    count(callback.bound, rank, sum(target.parameter.to_local().numel() for target in callback.bound.targets))
    for step in range(2):
        state.global_step = step
        callback.on_step_begin(arguments, state, None)
        for half in range(2):
            Sync.sync_gradients = half == 1
            model.set_requires_gradient_sync(half == 1)
            start = 8 * step + 4 * half + 2 * rank
            (model(**collate(rows[start : start + 2])).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        callback.on_optimizer_step(arguments, state, None)
        optimiser.zero_grad()
    said = shown(callback.bound)
    finish({name: value.full_tensor() for name, value in model.named_parameters()}, said)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drift") / "steps.py"
    path.write_text(SCRIPT)
    return path


def ran(script: Path, trio: Path, how: str, processes: int) -> tuple[dict[str, object], list[list[str]]]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(script), how, str(trio), str(script.parent)]
    done = subprocess.run(command, timeout=600, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line.split() for line in (script.parent / f"{how}.txt").read_text().splitlines()]
    return dict(load_file(script.parent / f"{how}.safetensors")), said


def counted(script: Path, how: str, rank: int) -> list[int]:
    """Bfloat16 values that are alive after binding; those that this process pushes; those of the whole Δ."""
    return [int(number) for number in (script.parent / f"{how}.{rank}.held").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(("one", "others", "tensors"), [("one", ("ddp", "fsdp"), 25), ("lora-one", ("lora-ddp",), 16)])
def test_two_processes_push_like_one(script: Path, trio: Path, one: str, others: tuple[str, ...], tensors: int) -> None:
    alone, said = ran(script, trio, one, 1)
    assert len(said) == tensors  # 4 layers of 4 projections, and where all weights train of 2 norms, and the last norm
    for how in others:
        together, also = ran(script, trio, how, 2)
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            assert (value - together[name]).abs().max() < 2e-6, (how, name)  # type: ignore[operator]
        for one_said, other in zip(said, also, strict=True):  # of whole parameters, not of shards
            assert one_said[0] == other[0]
            numbers = [float(x) for x in other[1:]]
            assert [float(x) for x in one_said[1:]] == pytest.approx(numbers, abs=2e-4), (how, other[0])
        if how.endswith("ddp"):
            counts = [counted(script, how, rank) for rank in range(2)]
            assert sum(mine for _, mine, _ in counts) == counts[0][2]
            assert all(held == mine < 0.6 * every for held, mine, every in counts)


@pytest.mark.slow
def test_a_process_holds_its_rows_of_delta_and_steps_as_with_all_of_it(script: Path, trio: Path) -> None:
    """The weights are the same bit for bit."""
    rows, said = ran(script, trio, "rows", 2)
    whole, also = ran(script, trio, "whole", 2)
    assert said == also and rows.keys() == whole.keys()
    assert all(value.equal(whole[name]) for name, value in rows.items())  # type: ignore[attr-defined]
    assert sum(counted(script, "rows", rank)[1] for rank in range(2)) == counted(script, "rows", 0)[2]
    for rank in range(2):
        held, mine, every = counted(script, "rows", rank)
        assert held == mine < 0.6 * every
        assert counted(script, "whole", rank) == [mine + every, mine, every], "the count sees what is kept"
