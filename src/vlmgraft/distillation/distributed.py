"""Training in several processes: dividing the batches among them, and joining the group under torchrun."""

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
"""Timeout of collective operations: the teacher's answers differ in length, so processes wait for each other."""


def shared(items: Sequence[T]) -> Iterator[tuple[T, float]]:
    """This process's items, each with weight 1; every process gets the same number of items.

    When items run out, a process repeats the first one with weight 0: with sharded weights every forward pass needs all
    processes, and one that stopped early would leave the others waiting.
    """
    rank, world = process()
    for start in range(0, len(items), world):
        at = start + rank
        yield (items[at], 1.0) if at < len(items) else (items[0], 0.0)


def of_all(part: torch.Tensor) -> list[torch.Tensor]:
    """Gather a tensor of this shape from every process, in rank order, in every process.

    Results of `shared` added in this order are added in the order of the items, as a single process adds them: sums in
    floating point have the same bits for any number of processes. Items of weight 0 give zeros, which change no sum.
    """
    if process()[1] == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(process()[1])]
    torch.distributed.all_gather(parts, part)
    return parts


def join_group() -> None:
    """Join the group that `torchrun` or `accelerate launch` describes in the environment; do nothing without one.

    The backend is NCCL between GPUs, and gloo between CPUs and for CPU tensors of GPU processes (torch's default). The
    group stays until the process ends, so that later calls use it too.
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
    """Inside the context, if `wanted` and there is no group, a group of this process alone: offloading needs one."""
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
    """Backend of a group whose tensors are on this device and on the CPU."""
    nccl = device.type == "cuda" and torch.distributed.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if nccl else "gloo"
