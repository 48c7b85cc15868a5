"""Atomic and durable file writes, and removal of what killed writers left.

A file is written under a hidden name beside its own, `.NAME.PID.N.tmp`, and locked while its writer lives. It is
flushed, renamed, and the folder is flushed. The lock ends with the writer's process, however that ends, so a later
process can tell a file that is being written from one that a killed process left.
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
"""Errors of file systems that cannot flush a folder, such as some network file systems."""

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of file systems without locks."""


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, and flush each into its own parent; raises OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, if the file system can; raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNKNOWN:
            error.filename = str(folder)  # os.fsync does not set it
            raise
    finally:
        os.close(handle)


FOREIGN = re.compile(r"\.tmp\w{6}")
"""Temporary files that the safetensors library leaves beside a file if it is killed while saving."""
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
        if isinstance(error, OSError) and error.filename is None:  # a failed write does not set it
            error.filename = str(path)
        raise
    flush_folder(path.parent)


def sweep_files(folder: Path, name: str = "") -> None:
    """In a folder of vlmgraft, remove the temporary files of killed writers: of the file `name`, or of every file."""
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
    """An empty temporary folder, removed at the end. Folders that killed processes left are removed first."""
    prefix = f"vlmgraft-{os.getuid()}-"
    with os.scandir(tempfile.gettempdir()) as entries:
        leftovers = [Path(entry) for entry in entries if entry.name.startswith(prefix)]
    for folder in leftovers:
        remove_folder_if_dead(folder)
    handle = -1
    while handle < 0 or not os.fstat(handle).st_nlink:
        if handle >= 0:
            os.close(handle)  # a sweep removed the folder before it was locked
            handle = -1
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        with suppress(FileNotFoundError):  # a sweep removed it before it was opened
            handle = os.open(folder, os.O_RDONLY)
            lock(handle, wait=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def lock(handle: int, *, wait: bool) -> None:
    """Lock an open file or folder, if its file system has locks; raises BlockingIOError unless `wait`."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _locked(path: Path) -> BinaryIO:
    """A new hidden file beside `path`, locked; retried if a sweep removes it before it is locked. An existing file or
    link is never opened."""
    while True:
        try:
            file = path.with_name(f".{path.name}.{os.getpid()}.{next(_numbers)}.tmp").open("xb")
        except FileExistsError:  # left by a killed process with this id
            continue
        lock(file.fileno(), wait=True)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()
