"""What a launcher says in the environment, and what no launcher says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.errors import InputError
from vlmgraft.storage.torchrun import rank_and_world

BUSY = """
import torch
from vlmgraft.storage.torchrun import leave_group
torch.distributed.init_process_group("gloo")
kept = torch.distributed.group.WORLD  # as sharded weights keep it: what holds the group keeps its threads alive
for _ in range(20):
    torch.distributed.all_reduce(torch.ones(100_000), async_op=True)
leave_group()
"""


@pytest.mark.parametrize(
    ("rank", "world", "expected"), [(None, None, (0, 1)), ("0", "1", (0, 1)), ("2", "3", (2, 3)), ("", "", (0, 1))]
)
def test_ranks(rank: str | None, world: str | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert rank_and_world() == expected


@pytest.mark.parametrize(
    ("rank", "world"), [("x", "1"), ("0", "abc"), ("-1", "2"), ("3", "3"), ("1e3", "1"), ("²", "3")]
)
def test_what_no_launcher_says(
    rank: str, world: str, trio: Path, tmp_path: Path, vlmgraft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(InputError, match=r"RANK|WORLD_SIZE"):
        rank_and_world()
    (tmp_path / "r.yaml").write_text(f"vlm: {trio}/vlm\ndonor: {trio}/donor\ndonor_base: {trio}/base\nmethod: linear\n")
    ran = vlmgraft("merge", tmp_path / "r.yaml", "--out", tmp_path / "out")
    assert ran.code == 2 and "unset" in ran.err and "Traceback" not in ran.err


@pytest.mark.slow
def test_a_process_ends_while_gloo_still_holds_its_tensors(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "busy.py")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
