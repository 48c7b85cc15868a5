"""Several processes at one training: who does which batch, and starting the group under torchrun."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from vlmgraft.errors import VlmgraftError
from vlmgraft.hf.placement import default_device
from vlmgraft.storage.torchrun import leave_group, rank_and_world

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


def agreed(decide: Callable[[], T]) -> T:
    """What the first process decides, in every process: on a network file system they may not see the same files.

    A VlmgraftError that it raises is raised in every process.
    """
    rank, world = process()
    if world == 1:
        return decide()
    decision: list[Any] = [None, None]  # the value, and what went wrong
    failure: VlmgraftError | None = None
    if rank == 0:
        try:
            decision[0] = decide()
        except VlmgraftError as error:
            failure, decision[1] = error, str(error)
    torch.distributed.broadcast_object_list(decision)
    if decision[1] is not None:
        raise failure or VlmgraftError(f"the first process: {decision[1]}")
    value: T = decision[0]
    return value


def check_same(what: str, digest: str) -> None:
    """Raise VlmgraftError in every process unless all of them have the same digest."""
    digests: list[Any] = [digest] * process()[1]
    if len(digests) > 1:
        torch.distributed.all_gather_object(digests, digest)
    odd = [rank for rank, value in enumerate(digests) if value != digests[0]]
    if odd:
        raise VlmgraftError(
            f"processes 0 and {odd[0]} differ in {what}: they see different files; name a folder that all of them share"
        )


def await_file(path: Path, seconds: float = 60.0) -> None:
    """Wait until this process sees a file that another one wrote, as network file systems let one; then go on."""
    end = time.monotonic() + seconds
    while not path.is_file() and time.monotonic() < end:
        time.sleep(0.2)
        if path.parent.is_dir():
            list(path.parent.iterdir())  # asks the server anew


def barrier() -> None:
    """Wait for all processes, if there are several."""
    if process()[1] > 1:
        torch.distributed.barrier()


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
