"""One process at a time at a folder, by an advisory lock on `.NAME.lock` beside it.

The system lets go of a lock when its process ends, however it ends, so a dead one never blocks; the file that a killed
process leaves is taken over and removed by the next. Where the file system knows no locks there are none. Two
machines see each other's as far as their file system carries `flock`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vlmgraft.errors import OutputError
from vlmgraft.folders import make_folder
from vlmgraft.resources import cannot_write, explained, out_of_memory

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""What a file system answers that knows no locks."""
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass
class _Held:
    """A lock of this process: how often its thread entered; what to close, and what to remove."""

    thread: int
    shared: bool
    times: int
    handle: int
    file: Path | None
    made: list[Path]


_held: dict[Path, _Held] = {}
_guard = threading.Lock()


@contextmanager
def locked(folder: str | Path, *, shared: bool = False) -> Iterator[None]:
    """Hold `folder`, which need not exist, until the context ends; the same thread may enter again.

    shared: for reading, together with others that read. Under torchrun the first process holds it for all.

    Raises:
        OutputError: another process, or another thread, holds it, or a folder to write cannot be written.
    """
    if int(os.environ.get("RANK", "0")) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    path = Path(os.path.realpath(folder))
    with _guard:
        mine = _held.get(path)
        if mine is not None and (mine.thread != threading.get_ident() or (mine.shared and not shared)):
            raise OutputError(_said(Path(folder), "another thread of this process"))
        if mine is None:
            made = [] if shared else [one for one in path.parents if not one.exists()]
            handle, file = _open(path, Path(folder), shared)
            mine = _held[path] = _Held(threading.get_ident(), shared, 0, handle, file, made)
        mine.times += 1
    try:
        yield
    finally:
        with _guard:
            mine.times -= 1
            if not mine.times:
                del _held[path]
                _release(mine)


@contextmanager
def at_work(out: str | Path, doing: str, lower: str) -> Iterator[None]:
    """What every function that fills a folder needs: nobody else is at it, and want of disk or memory is said plainly.

    Args:
        doing, lower: for the message where memory runs out: what was done, and which settings to lower.
    """
    with out_of_memory(doing, lower), explained(out), locked(out):
        yield


def _open(path: Path, named: Path, shared: bool) -> tuple[int, Path | None]:
    """A handle that holds the lock (-1: there are no locks here), and the file to remove at the end."""
    file, how = path.with_name(f".{path.name}.lock"), fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        try:
            if not shared:
                make_folder(file.parent)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno == errno.ENOENT and not shared:
                continue  # who held it removed the folder that was made for it
            if error.errno in READ_ONLY and path.is_dir():  # lock the folder itself
                file, handle = path, os.open(path, os.O_RDONLY)
            elif shared:
                return -1, None
            else:
                raise cannot_write(named, error) from None
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
            if file == path:
                return handle, None
            if _same(handle, file):  # else whoever held it removed it between our two calls
                with suppress(OSError):  # on a full disk the file stays empty, and is a lock all the same
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return handle, file
        except BlockingIOError:
            holder = "another process" if file == path else _holder(handle)
            os.close(handle)
            raise OutputError(_said(named, holder)) from None
        except OSError as error:
            os.close(handle)
            if error.errno in NO_LOCKS:
                return -1, None
            raise cannot_write(file, error) from None
        except BaseException:  # an interruption: this process, if it goes on, must not be locked out by itself
            os.close(handle)
            raise
        os.close(handle)


def _release(held: _Held) -> None:
    """Remove the file, unless others share it, and let go."""
    if held.handle < 0:
        return
    if held.file is not None:
        with suppress(OSError):
            if held.shared:
                fcntl.flock(held.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.file.unlink()
    with suppress(OSError):
        for folder in held.made:  # made for the lock alone, if nothing else came to be in them
            folder.rmdir()
    os.close(held.handle)


def _same(handle: int, file: Path) -> bool:
    """Whether the file of this name is still the one that is open."""
    try:
        there = file.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(handle)
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _holder(handle: int) -> str:
    said = os.pread(handle, 200, 0).decode(errors="replace").strip()
    return said if said.isprintable() and said else "another process"


def _said(folder: Path, holder: str) -> str:
    return f"{folder}: {holder} is at work there; wait until it is done, or name another folder"
