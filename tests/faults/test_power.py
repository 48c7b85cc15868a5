"""A power cut right after a command said that it is done: every byte and name of its output is on the disk by then.

A power cut may undo what was written to a file after it was last flushed, and what became of a name after its folder
was. Both are counted by inode; nothing of an output may be in question when its command ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from injected import Writes
from jobs import Job
from warm import changes

CONTENT = ("write", "pwrite", "pwritev", "posix_fallocate", "ftruncate", "sendfile")
Run = Callable[..., Any]


class Power(Writes):
    """When each file and each name in a folder was changed last, and when either was flushed last, by inode."""

    def __init__(self, under: Path) -> None:
        super().__init__(under)
        self.changed: dict[tuple[int, str], int] = {}
        self.flushed: dict[int, int] = {}

    def __call__(self, call: str, path: Any) -> None:
        with self.lock:
            now = len(self.seen)
            self.seen.append((call, Path()))
            if not isinstance(path, int):
                named = Path(os.fsdecode(path)).absolute()
                fails = call == "rmdir" and any(named.iterdir())  # a lock's folder, where it was made for the lock
                if named.parent.is_dir() and not fails:
                    self.changed[named.parent.stat().st_ino, named.name] = now
            elif call == "fsync":
                self.flushed[os.fstat(path).st_ino] = now
            elif call in CONTENT:
                self.changed[os.fstat(path).st_ino, ""] = now

    def in_question(self, out: Path) -> list[str]:
        """What of an output a power cut may undo: bytes of a file, or a name in its folder, its own included."""
        places = [out, *(sorted(out.rglob("*")) if out.is_dir() else ())]
        files = {(place, place.stat().st_ino, "") for place in places}
        places += [folder for folder in out.parents if self.under in folder.parents]
        names = {(place, place.parent.stat().st_ino, place.name) for place in places}
        return sorted(
            str(place.relative_to(self.under))
            for place, inode, name in files | names
            if self.flushed.get(inode, -1) <= self.changed.get((inode, name), -1)
        )


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("frism", "tune", "sweep", "front", "ties")]


@pytest.mark.parametrize("name", ["merge", "decompose", "gates", "evaluate", "export", "report", *LONG])
def test_all_is_on_disk_when_it_says_so(
    name: str, small_jobs: dict[str, Callable[[Path], Job]], vlmgraft: Run, tmp_path: Path
) -> None:
    job, power = small_jobs[name](tmp_path / "new" / "folder"), Power(tmp_path)
    with changes(power):
        ran = vlmgraft(*job.arguments)
    assert ran.code == 0, ran.err
    assert len(power.seen) > 4 and job.out.exists()
    assert power.in_question(job.out) == []


def test_what_is_not_flushed_is_seen(tmp_path: Path) -> None:
    power = Power(tmp_path)
    out = tmp_path / "out"
    with changes(power):
        out.mkdir()
        with (out / "a").open("wb") as file:
            file.write(b"a")
            file.flush()
            os.fsync(file.fileno())
            file.write(b"b")
        (out / "a").rename(out / "b")
        handle = os.open(out, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    assert power.in_question(out) == ["out", "out/b"]
