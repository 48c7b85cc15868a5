"""Several processes at one training: who does which batch, and starting the group under torchrun."""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch

from vlmgraft.hf.placement import default_device
from vlmgraft.storage.torchrun import leave_group, process, rank_and_world

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long processes wait for each other: answers of the teacher differ in length."""


def shared(items: Sequence[T]) -> Iterator[tuple[T, float]]:
    """This process's items, each with weight 1; every process gets equally many.

    Where items run out, a process repeats the first one with weight 0: with sharded weights every forward pass is work
    of all processes together, and one that stopped early would leave the others waiting.
    """
    rank, world = process()
    for start in range(0, len(items), world):
        at = start + rank
        yield (items[at], 1.0) if at < len(items) else (items[0], 0.0)


def of_all(part: torch.Tensor) -> list[torch.Tensor]:
    """Every process's tensor of this shape, in the order of the ranks, in every process.

    What `shared` dealt out is added up in the order of the items in this way, as one process adds it: floating-point
    sums then have the same bits for any number of processes. What does not count is zero, and adding it changes none.
    """
    if process()[1] == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(process()[1])]
    torch.distributed.all_gather(parts, part)
    return parts


def join_group() -> None:
    """Join the group that `torchrun` or `accelerate launch` describes in the environment; nothing without one.

    NCCL between GPUs, gloo between CPUs, and for what GPUs keep there (as torch does by itself). The group stays until
    the process ends: what is called next uses it too.
    """
    if rank_and_world()[1] < 2 or process()[1] > 1:
        return
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(_backend(device), timeout=PATIENCE)
    atexit.register(leave_group)


@contextmanager
def group_of_one(wanted: bool, device: torch.device) -> Iterator[None]:
    """Inside the context, if wanted, a group of this process alone where there is none: offloaded layers need one."""
    if not wanted or torch.distributed.is_initialized():
        yield
        return
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        torch.distributed.init_process_group(_backend(device), store=HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            leave_group()


def _backend(device: torch.device) -> str:
    """Of a group whose tensors are on such devices, and on the CPU."""
    nccl = device.type == "cuda" and torch.distributed.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if nccl else "gloo"
