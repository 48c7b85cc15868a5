"""A merge that was interrupted and continued is the merge that was not, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from merge_builders import aligned, build, bytes_in, facts_in

from vlmgraft.checkpoint.writer import Writer
from vlmgraft.errors import OutputError
from vlmgraft.merging import merge_tensors
from vlmgraft.methods.task_arithmetic import TaskArithmetic


class InterruptedMergeError(Exception):
    """Stands for Ctrl-C, a full disk or a power cut."""


def stop_after(number: int) -> object:
    def progress(done: int, total: int, _: str) -> None:
        if done == number:
            raise InterruptedMergeError

    return progress


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("number", [1, 5, 12])
def test_continued_is_uninterrupted(number: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path)
    merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "whole", shard_size=200_000)
    options = {"shard_size": 200_000, "threads": threads, "resume": True}
    with pytest.raises(InterruptedMergeError):
        merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "out", progress=stop_after(number), **options)
    (partial,) = tmp_path.glob(".out.partial-*")
    assert not (tmp_path / "out").exists()
    written: list[str] = []
    finish = Writer.finish
    monkeypatch.setattr(Writer, "finish", lambda self, name, facts: written.append(name) or finish(self, name, facts))
    receipt = merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "out", **options)
    assert len(written) == len(receipt.tensors) - number and not partial.exists()
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "whole")
    assert facts_in(tmp_path / "out") == facts_in(tmp_path / "whole")


def test_what_a_kill_left_in_the_hidden_folder_is_not_published(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(InterruptedMergeError):
        merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "out", progress=stop_after(5), resume=True)
    (partial,) = tmp_path.glob(".out.partial-*")
    for name in (".receipt.json.99999.0.tmp", ".tmpAbCdEf", "side-file-of-before.json"):
        (partial / name).touch()
    with (partial / ".journal.jsonl").open("a") as journal:
        journal.write('{"name": "cut sho')
    merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "out", resume=True)
    merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "whole")
    found, expected = ({path.name for path in (tmp_path / name).iterdir()} for name in ("out", "whole"))
    assert found == expected and bytes_in(tmp_path / "out") == bytes_in(tmp_path / "whole")


def test_another_method_or_other_weights_start_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path)
    with pytest.raises(InterruptedMergeError):
        merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "out", progress=stop_after(5), resume=True)
    merge_tensors(aligned(tmp_path), TaskArithmetic(0.4), tmp_path / "other", resume=True)
    os.utime(tmp_path / "donor" / "model.safetensors", ns=(1, 1))
    written: list[str] = []
    finish = Writer.finish
    monkeypatch.setattr(Writer, "finish", lambda self, name, facts: written.append(name) or finish(self, name, facts))
    receipt = merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "out", resume=True)
    assert len(written) == len(receipt.tensors)


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path)
    write, calls = Writer.write_bytes, [0]

    def full(self: Writer, name: str, offset: int, data: memoryview) -> None:
        calls[0] += 1
        if calls[0] > 8:
            raise OutputError(f"{self.out}: cannot be written (No space left on device)")
        write(self, name, offset, data)

    monkeypatch.setattr(Writer, "write_bytes", full)
    for resume in (False, True):
        calls[0] = 0
        with pytest.raises(OutputError, match="No space"):
            merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "out", resume=resume, threads=1)
        assert len(list(tmp_path.glob(".out.partial-*"))) == resume
    monkeypatch.undo()
    merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "out", resume=True)
    merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "whole")
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "whole")


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from merge_builders import aligned
from vlmgraft.merging import merge_tensors
from vlmgraft.methods.task_arithmetic import TaskArithmetic
folder = Path(sys.argv[1])
def progress(done, total, name):
    if done == 6:
        os.kill(os.getpid(), signal.SIGKILL)
merge_tensors(aligned(folder), TaskArithmetic(0.3), folder / "out", resume=True, progress=progress)
"""


def test_a_killed_process_is_continued(tmp_path: Path) -> None:
    build(tmp_path)
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and len(list(tmp_path.glob(".out.partial-*"))) == 1
    merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "out", resume=True)
    merge_tensors(aligned(tmp_path), TaskArithmetic(0.3), tmp_path / "whole")
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "whole") and not list(tmp_path.glob(".out*"))
