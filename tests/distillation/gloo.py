"""A script in several gloo processes, and torch's threads for what is compared with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def launch(arguments: list[str], processes: int = 2, *, killed: str = "") -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"KILLED": killed} if killed else {})
    done = subprocess.run([*command, *arguments], timeout=570, capture_output=True, text=True, env=environment)
    errors = [line for line in done.stderr.splitlines() if "Error" in line]  # between hundreds of lines of frames
    assert (done.returncode != 0) == bool(killed), "\n".join([*errors[:20], done.stderr[-3000:]])


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)
