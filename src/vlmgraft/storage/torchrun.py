"""The processes of one job: ranks from the environment that `torchrun` and `accelerate launch` set, common decisions
about shared folders whose files some processes see later than others, and leaving the process group."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vlmgraft.errors import InputError, VlmgraftError

T = TypeVar("T")

SETTLING = 1.0
"""Seconds given to gloo's threads to finish; milliseconds would suffice on an idle machine."""


def rank_and_world() -> tuple[int, int]:
    """This process's number, from 0, and the number of processes: RANK and WORLD_SIZE; (0, 1) without them.

    Raises:
        InputError: they have values that no launcher sets.
    """
    rank, world = whole_number("RANK", 0), whole_number("WORLD_SIZE", 1)
    if not 0 <= rank < max(1, world):
        raise InputError(f"RANK={rank}, WORLD_SIZE={world}: no such process; unset both, or start it with torchrun")
    return rank, max(1, world)


def whole_number(name: str, default: int) -> int:
    """The whole number in an environment variable; raises InputError."""
    text = os.environ.get(name, "").strip() or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InputError(f"{name}={text!r:.60}: is no whole number; unset it, or start the command with torchrun")
    return int(text)


def _group() -> Any:
    """torch.distributed if this process is in a process group, else None; does not import torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed


def process() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    group = _group()
    return (0, 1) if group is None else (group.get_rank(), group.get_world_size())


def agreed(decide: Callable[[], T]) -> T:
    """The first process's decision, in every process: on a network file system they may not see the same files.

    A VlmgraftError that it raises is raised in every process.
    """
    rank, world = process()
    if world == 1:
        return decide()
    decision: list[Any] = [None, None]  # the value, and the error
    failure: VlmgraftError | None = None
    if rank == 0:
        try:
            decision[0] = decide()
        except VlmgraftError as error:
            failure, decision[1] = error, str(error)
    _group().broadcast_object_list(decision)
    if decision[1] is not None:
        raise failure or VlmgraftError(f"the first process: {decision[1]}")
    value: T = decision[0]
    return value


def check_same(what: str, digest: str) -> None:
    """Raise VlmgraftError in every process unless all of them have the same digest."""
    digests: list[Any] = [digest] * process()[1]
    if len(digests) > 1:
        _group().all_gather_object(digests, digest)
    odd = [rank for rank, value in enumerate(digests) if value != digests[0]]
    if odd:
        raise VlmgraftError(
            f"processes 0 and {odd[0]} differ in {what}: they see different files; name a folder that all of them share"
        )


def await_file(path: Path, seconds: float = 60.0) -> None:
    """Wait up to `seconds` for another process's file to become visible here: network file systems may delay it."""
    end = time.monotonic() + seconds
    while not path.is_file() and time.monotonic() < end:
        time.sleep(0.2)
        if path.parent.is_dir():
            list(path.parent.iterdir())  # asks the server again


def barrier() -> None:
    """Wait for all processes, if there are several."""
    if process()[1] > 1:
        _group().barrier()


def leave_group() -> None:
    """Leave torch's process group, if there is one, so that this process can end.

    Gloo's threads need the interpreter to free the tensors of the last calls, and `destroy_process_group` does not wait
    for them: a process that ends earlier is aborted (pytorch/pytorch issue 190489).
    """
    group = _group()
    if group is None:
        return
    gloo = "gloo" in group.get_backend()
    group.destroy_process_group()
    if gloo:
        time.sleep(SETTLING)
