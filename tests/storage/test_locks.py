"""Two processes with one folder: the second is told who is there; a dead one never blocks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.lock_holder import held_elsewhere
from vlmgraft.errors import OutputError
from vlmgraft.storage.locks import locked


def test_the_second_process_is_told_which_one_is_there(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with held_elsewhere(out) as process:
        said = f"out: process {process.pid} on .* at work"
        with pytest.raises(OutputError, match=said), locked(out):
            pytest.fail("entered")
    assert not list(tmp_path.iterdir()), "neither the lock nor the folder made for it stays"


def test_a_dead_holder_does_not_block(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "out") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / ".out.lock").exists(), "what a kill leaves"
        with locked(tmp_path / "out"):
            pass
    assert not list(tmp_path.iterdir())


def test_readers_share_and_keep_a_writer_out(tmp_path: Path) -> None:
    store = tmp_path / "factors"
    store.mkdir()
    with held_elsewhere(store, "shared"):
        with locked(store, shared=True), pytest.raises(OutputError, match="another thread"), locked(store):
            pytest.fail("entered")
        with pytest.raises(OutputError, match="at work"), locked(store):
            pytest.fail("entered")
    with held_elsewhere(store), pytest.raises(OutputError, match="at work"), locked(store, shared=True):
        pytest.fail("entered")
    with locked(store):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["factors"]


def test_the_same_thread_enters_again_and_another_does_not(tmp_path: Path) -> None:
    said: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path / "out"):
                pass
        except OutputError as error:
            said.append(str(error))

    with locked(tmp_path / "out"):
        with locked(tmp_path / "out"), locked(tmp_path / "out", shared=True):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with pytest.raises(BlockingIOError):  # the inner contexts did not let go
            handle = os.open(tmp_path / ".out.lock", os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    assert len(said) == 1 and "another thread" in said[0]
    assert not list(tmp_path.iterdir())


def test_one_lock_for_all_names_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    with held_elsewhere(tmp_path / "link" / "out"), pytest.raises(OutputError), locked(tmp_path / "real" / "out"):
        pytest.fail("entered")


def test_only_the_first_process_under_torchrun_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_elsewhere(tmp_path / "out"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path / "out"):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(OutputError), locked(tmp_path / "out"):
            pytest.fail("entered")


def test_a_lock_that_is_removed_meanwhile_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, its holder may remove it: a lock on that file would be worth nothing."""
    real, file = fcntl.flock, tmp_path / ".out.lock"
    removed: list[int] = []

    def flock(handle: int, how: int) -> None:
        if not removed:
            removed.append(os.fstat(handle).st_ino)
            file.unlink()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "out"):
        assert removed and file.exists()
        with pytest.raises(OutputError), _as_another_process(), locked(tmp_path / "out"):
            pytest.fail("entered")


@contextmanager
def _as_another_process() -> Iterator[None]:
    """Forget what this process holds; a second handle on a lock file is as good as a second process."""
    from vlmgraft.storage import locks

    mine = dict(locks._locks)
    locks._locks.clear()
    try:
        yield
    finally:
        locks._locks.update(mine)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_work_goes_on(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "out"):
        pass
