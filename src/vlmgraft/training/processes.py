"""Several processes at one training: who does which batch, and starting the group under torchrun."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long processes wait for each other: answers of the teacher differ in length."""


def process() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def shared(items: Sequence[T]) -> Iterator[tuple[T, float]]:
    """This process's items, each with weight 1; every process gets equally many.

    Where items run out, a process repeats the first one with weight 0: with sharded weights every forward pass is work
    of all processes together, and one that stopped early would leave the others waiting.
    """
    rank, world = process()
    for start in range(0, len(items), world):
        at = start + rank
        yield (items[at], 1.0) if at < len(items) else (items[0], 0.0)


def barrier() -> None:
    """Wait for all processes, if there are several."""
    if process()[1] > 1:
        torch.distributed.barrier()


def local_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def join_group() -> None:
    """Join the group that `torchrun` or `accelerate launch` describes in the environment; nothing without one.

    NCCL between GPUs, gloo between CPUs. The group stays until the process ends: what is called next uses it too.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or process()[1] > 1:
        return
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    atexit.register(torch.distributed.destroy_process_group)
