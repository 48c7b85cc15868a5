"""Folders are whole or absent: killed at any step, publishing leaves the old one, the new one or none, and no trace."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vlmgraft.errors import NumericalError, OutputError
from vlmgraft.storage import publish
from vlmgraft.storage.files import new_file
from vlmgraft.storage.publish import Publication, new_folder, sweep_folders

CHILD = """
import os, signal, sys
from pathlib import Path
from vlmgraft.storage import publish
from vlmgraft.storage.files import new_file
out, key, replace, steps = Path(sys.argv[1]), sys.argv[2] or None, sys.argv[3] == "replace", int(sys.argv[4])
done = [0]
def counted(owner, name):
    real = getattr(owner, name)
    def call(*args, **options):
        done[0] += 1
        if done[0] == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    setattr(owner, name, call)
for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
    counted(os, name)
counted(publish, "_renameat2")
with publish.Publication(out, key, replace=replace) as publication:
    for name in ("a", "b"):
        (publication.folder / name).write_text("new")
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(out: Path, key: str = "", how: str = "", steps: int = 1) -> bool:
    """Whether a process that publishes `out` was killed at this step, or had none left."""
    done = subprocess.run([sys.executable, "-c", CHILD, out, key, how, str(steps)], check=False)
    assert done.returncode in (0, -signal.SIGKILL)
    return done.returncode != 0


def old(out: Path) -> None:
    out.mkdir()
    for name in ("a", "c"):
        (out / name).write_text("old")


@pytest.mark.parametrize("how", ["", "replace"])
def test_killed_at_every_step(how: str, tmp_path: Path) -> None:
    steps, states = 0, set()
    while True:
        steps += 1
        out = tmp_path / str(steps) / "out"
        out.parent.mkdir()
        if how:
            old(out)
        if not killed(out, how=how, steps=steps):
            break
        state = {path.name: path.read_text() for path in out.iterdir()} if out.exists() else None
        states.add(str(state))
        allowed = [{"a": "new", "b": "new"}, {"a": "old", "c": "old"} if how else None]
        assert state in allowed
        sweep_folders(out)
        assert names(out.parent) == (["out"] if out.exists() else [])
    assert steps > 6 and len(states) == 2, "some were killed before it was there, some after"


def test_what_can_be_continued_stays_until_there_is_an_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert killed(out, key="aaaaaaaaaaaaaaaa", steps=3)
    assert killed(out, key="", steps=3)
    assert len(names(tmp_path)) == 2
    with Publication(out, "bbbbbbbbbbbbbbbb"):
        assert names(tmp_path) == [".out.partial-aaaaaaaaaaaaaaaa", ".out.partial-bbbbbbbbbbbbbbbb"]
    assert names(tmp_path) == ["out"]


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as mine:
        (mine / "file").touch()
        sweep_folders(out, finished=True)
        with pytest.raises(OutputError, match=r"another process|something is in its place"), new_folder(out):
            pytest.fail("entered")
        assert names(mine) == ["file"]
    assert names(out) == ["file"]


def test_nothing_is_ever_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for appeared in (out.mkdir, lambda: out.write_text("file"), lambda: out.symlink_to("nowhere")):
        with pytest.raises(OutputError, match=r"appeared while it was being written"), new_folder(out):
            appeared()
        assert names(tmp_path) == ["out"]
        out.rmdir() if out.is_dir() else out.unlink()


@pytest.mark.parametrize("kept", [True, False])
def test_a_refusal_is_not_kept_and_everything_else_is(kept: bool, tmp_path: Path) -> None:
    error = OutputError("full") if kept else NumericalError("NaN")
    with pytest.raises(type(error)), Publication(tmp_path / "out", "key") as publication:
        (publication.folder / "file").touch()
        raise error
    assert names(tmp_path) == ([".out.partial-key"] if kept else [])


def test_a_file_system_that_cannot_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder goes aside for an instant; killed in it, the next run puts it back."""
    monkeypatch.setattr(publish, "_renameat2", lambda *_: False)
    out = tmp_path / "out"
    old(out)
    with new_folder(out, replace=True) as made:
        (made / "a").write_text("new")
    assert names(out) == ["a"] and names(tmp_path) == ["out"]
    out.rename(tmp_path / f".out.partial-1{publish.OLD}")
    sweep_folders(out)
    assert names(tmp_path) == ["out"] and names(out) == ["a"]
    with pytest.raises(OutputError, match="appeared"), new_folder(tmp_path / "new"):
        (tmp_path / "new").mkdir()


def test_everything_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, flushed = tmp_path / "out", []
    flush = os.fsync

    def noted(handle: int) -> None:
        flushed.append((Path(f"/proc/self/fd/{handle}").resolve().name, out.exists()))
        flush(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with new_folder(out) as made:
        (made / "inner").mkdir()
        (made / "inner" / "file").touch()
        (made / "side").touch()
        hidden = made.name
    assert sorted(flushed[:4]) == sorted((name, False) for name in ("file", "inner", "side", hidden))
    assert flushed[4:] == [(tmp_path.name, True)]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is written as ever; what may be another's is not removed."""
    assert killed(tmp_path / "out", steps=3)

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with new_folder(tmp_path / "out") as made, new_file(made / "file") as file:
        file.write(b"x")
    (stray,) = (name for name in names(tmp_path) if name != "out")
    assert names(tmp_path / "out") == ["file"] and stray.startswith(".out.partial-")


def test_a_disk_that_fails_keeps_what_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OutputError, match="cannot be written"), Publication(tmp_path / "out", "key") as publication:
        (publication.folder / "file").touch()
        monkeypatch.setattr(os, "fsync", broken)
    assert names(tmp_path) == [".out.partial-key"]
