"""Files are whole or absent; what killed writers leave is found, what living ones write is not touched."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from vlmgraft.checkpoint.header import read_header
from vlmgraft.checkpoint.reader import TORCH_DTYPES
from vlmgraft.checkpoint.saving import save_tensors
from vlmgraft.durable import new_file, scratch_folder, sweep_files
from vlmgraft.folders import make_folder
from vlmgraft.records import append_row, read_rows

KILLED = """
import os, signal, sys
from pathlib import Path
from vlmgraft.durable import new_file
with new_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""

SCRATCH = """
import os, signal
from vlmgraft.durable import scratch_folder
with scratch_folder() as folder:
    (folder / "inner").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_while_writing(path: Path) -> None:
    """A process that is killed in the middle of writing `path`."""
    done = subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_file_system_that_cannot_flush_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some over a network answer EINVAL; a full disk is still an error."""
    answer = errno.EINVAL

    def fsync(handle: int) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(os, "fsync", fsync)
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    answer = errno.ENOSPC
    with pytest.raises(OSError, match="No space"):
        make_folder(tmp_path / "c")


def test_a_killed_writer_leaves_the_old_file_and_a_stray_that_is_found(tmp_path: Path) -> None:
    target, other = tmp_path / "file", tmp_path / "file.other"
    target.write_bytes(b"old")
    killed_while_writing(target)
    killed_while_writing(other)
    assert target.read_bytes() == b"old" and len(names(tmp_path)) == 3
    sweep_files(tmp_path, "file.other")
    assert len(names(tmp_path)) == 2
    (tmp_path / ".tmpdbQGUc").write_bytes(b"of the safetensors library")
    sweep_files(tmp_path)
    assert names(tmp_path) == ["file"]


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    with new_file(tmp_path / "file") as one, new_file(tmp_path / "file") as other:
        one.write(b"one")
        other.write(b"other")
        sweep_files(tmp_path)
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"one"


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_flushed_before_it_appears_and_the_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    flush = os.fsync

    def noted(handle: int) -> None:
        seen.append((Path(f"/proc/self/fd/{handle}").resolve() == tmp_path, (tmp_path / "file").exists()))
        flush(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with new_file(tmp_path / "file") as file:
        file.write(b"x")
    assert seen == [(False, False), (True, True)]


DTYPES = sorted(
    set(TORCH_DTYPES.values()) & {torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool}, key=str
)


@given(
    shapes=st.dictionaries(
        st.text("aZ0._ßµ", min_size=1, max_size=5),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    ),
    notes=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3),
)
def test_the_library_reads_what_we_save(
    shapes: dict[str, tuple[torch.dtype, list[int]]], notes: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "ours.safetensors"
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in shapes.items()}
    save_tensors(tensors, path, notes)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == one.dtype and found[name].equal(one) for name, one in tensors.items())
    for name, info in read_header(path).items():
        assert info.begin % tensors[name].element_size() == 0, "aligned"


def test_scratch_folders_of_killed_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as living:
        (living / "file").touch()
        done = subprocess.run([sys.executable, "-c", SCRATCH], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
        assert done.returncode == -signal.SIGKILL and len(names(tmp_path)) == 2
        with scratch_folder() as other:
            assert set(tmp_path.iterdir()) == {living, other} and names(living) == ["file"]
    assert names(tmp_path) == []


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), max_size=4),
    cut=st.integers(0, 10_000),
    flush=st.booleans(),
)
def test_a_log_cut_anywhere_goes_on(
    rows: list[dict[str, int]], cut: int, flush: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "log.jsonl"
    path.unlink(missing_ok=True)
    for row in rows:
        append_row(path, {**row, "long": "x" * 5000})
    whole = path.read_bytes() if rows else b""
    path.write_bytes(whole[: cut % (len(whole) + 1)])
    kept = path.read_bytes().count(b"\n")
    append_row(path, {"last": 1}, flush=flush)
    found = list(read_rows(path))
    assert found == [*({**row, "long": "x" * 5000} for row in rows[:kept]), {"last": 1}]
