"""Where results may be written: the same rules for every command that fills a folder or writes a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

from vlmgraft.errors import OutputError

KERNEL = (Path("/proc"), Path("/sys"), Path("/dev"))
"""File systems of the kernel: a folder made there fails in ways that no retry can fix."""
SHARED_MEMORY = Path("/dev/shm")


def refuse_place(out: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """Raise OutputError if `out` must not hold results, whether it exists or not.

    Refused: a folder of the kernel; an input, a folder inside one, and a folder around one. inputs: folders and files;
    a string that names nothing on disk may be a hub id, and is skipped.
    """
    real = Path(os.path.realpath(out))
    if any(real == root or root in real.parents for root in KERNEL) and SHARED_MEMORY not in real.parents:
        raise OutputError(f"{out}: belongs to the kernel; name a folder on a disk")
    for path in inputs:
        source = Path(os.path.realpath(path))
        if isinstance(path, str) and not os.path.lexists(source):
            continue
        if real == source or source in real.parents:
            raise OutputError(f"{out}: is the input {path} or lies inside it; choose another output folder")
        if real in source.parents:
            raise OutputError(f"{out}: the input {path} lies inside it; choose another output folder")


def refuse_output(out: Path, inputs: Iterable[str | Path] = (), *, ours: Callable[[str], bool] | None = None) -> None:
    """Raise OutputError unless a command may make the folder `out`: `refuse_place` accepts it, and it does not exist.

    ours: whether a file name is one that the command itself writes; if given, `out` may exist with only such files, to
    be resumed or replaced.
    """
    refuse_place(out, inputs)
    if ours is not None and out.is_dir():
        others = sorted(path.name for path in out.iterdir() if not ours(path.name))
        if others:
            raise OutputError(f"{out}: holds {others[0]}, which this command did not write; choose another folder")
    elif out.is_symlink() or out.exists():
        raise OutputError(f"{out}: exists; choose another output folder or remove it")
    parent = Path(os.path.realpath(out)).parent
    if parent.exists() and not parent.is_dir():
        raise OutputError(f"{out}: {parent} is not a folder")


def refuse_others_folder(out: Path, patterns: Iterable[str]) -> None:
    """Raise OutputError unless a command may fill the folder `out` step by step: it is absent, empty, or holds a file
    or folder that the command left there, with a name that matches one of the patterns."""
    if out.is_dir():
        names = [path.name for path in out.iterdir()]
        if names and not any(fnmatch(name, pattern) for name in names for pattern in patterns):
            raise OutputError(f"{out}: holds {min(names)}, which this command did not write; choose another folder")
    elif out.is_symlink() or out.exists():
        raise OutputError(f"{out}: is not a folder; choose another output folder or remove it")


def refuse_file(out: Path, ours: Callable[[bytes], bool], inputs: Iterable[str | Path] = ()) -> None:
    """Raise OutputError unless a command may write the file `out`: it is absent, or the command wrote it.

    ours: whether the first 4096 bytes of a file are those of one that the command wrote. inputs: files that are read;
    `out` must not be one of them.
    """
    real = Path(os.path.realpath(out))
    refuse_place(out)
    if any(real == Path(os.path.realpath(path)) for path in inputs):
        raise OutputError(f"{out}: is an input; name another file")
    if real.parent.exists() and not real.parent.is_dir():
        raise OutputError(f"{out}: {real.parent} is not a folder")
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise OutputError(f"{out}: is not a regular file; name another one")
    if out.exists():
        with out.open("rb") as file:
            if not ours(file.read(4096)):
                raise OutputError(f"{out}: exists, and this command did not write it; name another file or remove it")


def disk_of(out: Path) -> tuple[Path, int]:
    """The existing folder that will hold `out`, and the free bytes on its disk."""
    folder = next(folder for folder in out.resolve().parents if folder.exists())
    return folder, shutil.disk_usage(folder).free


def free_space(out: Path, nbytes: int) -> None:
    """Raise OutputError if the disk of `out` has less than `nbytes` free."""
    _, free = disk_of(out)
    if free < nbytes:
        raise OutputError(
            f"{out}: {nbytes / 1e9:.2f} GB will be written, and its disk has {free / 1e9:.2f} GB free; make room, or "
            "choose another disk"
        )
