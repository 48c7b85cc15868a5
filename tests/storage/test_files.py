"""Files are whole or absent; what killed writers leave is found, what living ones write is not touched."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.storage import files
from vlmgraft.storage.files import flush_folder, make_folder, new_file, scratch_folder, sweep_files


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


def test_each_new_folder_is_flushed_into_the_one_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(Path(f"/proc/self/fd/{handle}").resolve()))
    make_folder(tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a" / "b")
    assert len(flushed) == 2
    flush_folder(tmp_path / "a" / "b")
    assert flushed[2:] == [tmp_path / "a" / "b"]


KILLED = """
import os, signal, sys
from pathlib import Path
from vlmgraft.storage.files import new_file
with new_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""

SCRATCH = """
import os, signal
from vlmgraft.storage.files import scratch_folder
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


@pytest.mark.parametrize("call", ["open", "lock"])
def test_another_process_sweeps_a_scratch_folder_before_it_is_locked(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module, swept = {"open": os, "lock": files}[call], list[Path]()
    ordinary = getattr(module, call)

    def late(*given: Any, **options: Any) -> Any:
        if not swept:
            swept.extend(tmp_path.iterdir())
            swept[0].rmdir()
        return ordinary(*given, **options)

    monkeypatch.setattr(module, call, late)
    with scratch_folder() as folder:
        assert folder not in swept and [*tmp_path.iterdir()] == [folder]
    assert names(tmp_path) == []


def test_scratch_folders_of_killed_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as living:
        (living / "file").touch()
        done = subprocess.run([sys.executable, "-c", SCRATCH], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
        assert done.returncode == -signal.SIGKILL and len(names(tmp_path)) == 2
        with scratch_folder() as other:
            assert set(tmp_path.iterdir()) == {living, other} and names(living) == ["file"]
    assert names(tmp_path) == []
