"""Files that are whole under their name or absent, on disk when they appear, and traces of killed writers removed.

A file is written under a hidden name beside its own, `.NAME.PID.N.tmp`, and locked while its writer lives. It is
flushed, renamed, and the folder is flushed. The lock ends with the writer, however that ends, so whoever comes later
can tell what is being written from what a killed process left.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

UNKNOWN = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What file systems answer that cannot flush a folder, such as some over a network."""

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""What a file system answers that knows no locks."""


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, each flushed into the one above; raises OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)


def flush_folder(folder: Path) -> None:
    """Put a folder's list of names on disk, where the file system can; raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNKNOWN:
            error.filename = str(folder)  # os.fsync knows no name
            raise
    finally:
        os.close(handle)


FOREIGN = re.compile(r"\.tmp\w{6}")
"""What the safetensors library leaves beside a file, if it is killed while it saves."""
_numbers = itertools.count()


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the name `path` after a clean exit; raises OSError."""
    file = _locked(path)
    temporary = Path(file.name)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a write knows no name
            error.filename = str(path)
        raise
    flush_folder(path.parent)


def sweep_files(folder: Path, name: str = "") -> None:
    """Remove what killed writers left of the file `name` in a folder of ours, or of every file; others' are left."""
    prefix = f".{name}." if name else "."
    with os.scandir(folder) as entries:
        strays = [
            Path(entry)
            for entry in entries
            if (entry.name.startswith(prefix) and entry.name.endswith(".tmp"))
            or (not name and FOREIGN.fullmatch(entry.name))
        ]
    for stray in strays:
        remove_if_dead(stray)


def remove_if_dead(stray: Path) -> None:
    """Remove a file unless its writer lives."""
    _remove_if_dead(stray, os.O_NONBLOCK, Path.unlink)


def remove_folder_if_dead(folder: Path) -> None:
    """Remove a folder and what is in it, unless its writer lives."""
    _remove_if_dead(folder, os.O_DIRECTORY, shutil.rmtree)


def _remove_if_dead(path: Path, kind: int, remove: Callable[[Path], Any]) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | kind)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(path)
    except OSError:  # its writer lives, another sweep was first, or it is not ours to remove
        pass
    finally:
        os.close(handle)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder among the system's temporary ones, removed at the end; those that killed processes left, too."""
    prefix = f"vlmgraft-{os.getuid()}-"
    with os.scandir(tempfile.gettempdir()) as entries:
        leftovers = [Path(entry) for entry in entries if entry.name.startswith(prefix)]
    for folder in leftovers:
        remove_folder_if_dead(folder)
    handle = -1
    while handle < 0 or not os.fstat(handle).st_nlink:
        if handle >= 0:
            os.close(handle)  # a sweep came between the folder and its lock
            handle = -1
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        with suppress(FileNotFoundError):  # it came before the folder was opened
            handle = os.open(folder, os.O_RDONLY)
            lock(handle, wait=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def lock(handle: int, *, wait: bool) -> None:
    """Lock an open file or folder, where its file system knows locks; raises BlockingIOError unless `wait`."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _locked(path: Path) -> BinaryIO:
    """A new hidden file beside `path` with a lock on it; again if a sweep came between the two. A file or link that is
    there already is never opened."""
    while True:
        try:
            file = path.with_name(f".{path.name}.{os.getpid()}.{next(_numbers)}.tmp").open("xb")
        except FileExistsError:  # of a killed process with this number
            continue
        lock(file.fileno(), wait=True)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()
