"""What `torchrun` and `accelerate launch` say in the environment about the processes of one job, and leaving it."""

from __future__ import annotations

import os
import sys
import time

from vlmgraft.errors import InputError

SETTLING = 1.0
"""Seconds that gloo's threads have to end their work; milliseconds would do on an idle machine."""


def rank_and_world() -> tuple[int, int]:
    """This process's number, from 0, and the number of processes: RANK and WORLD_SIZE; (0, 1) without them.

    Raises:
        InputError: they are set to what no launcher sets.
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


def leave_group() -> None:
    """Leave torch's process group, if there is one, so that this process may end.

    Gloo's threads need the interpreter to free the tensors of the last calls, and `destroy_process_group` does not wait
    for them: a process that ends first is aborted (pytorch/pytorch issue 190489).
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    gloo = "gloo" in torch.distributed.get_backend()
    torch.distributed.destroy_process_group()
    if gloo:
        time.sleep(SETTLING)
