"""One process at a time per folder, by an advisory lock on `.NAME.lock` beside it.

The system releases a lock when its process ends, however it ends, so a dead process never blocks. The next process
takes over and removes the file that a killed one left. On a file system without locks nothing is locked. Locks hold
across machines if their shared file system supports `flock`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vlmgraft.errors import OutputError
from vlmgraft.storage.files import NO_LOCKS, make_folder
from vlmgraft.storage.outputs import refuse_others_folder, refuse_place
from vlmgraft.storage.progress import LOG, duration
from vlmgraft.storage.resources import cannot_write, explained, out_of_memory
from vlmgraft.storage.torchrun import rank_and_world

ATTEMPTS = 100
MARK = b"process "
"""First bytes of a lock file."""
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass
class _Lock:
    """A lock of this process. times: how often its thread entered. file, made: the file and the folders to remove."""

    thread: int
    shared: bool
    times: int
    handle: int
    file: Path | None
    made: list[Path]


_locks: dict[Path, _Lock] = {}
_guard = threading.Lock()


@contextmanager
def locked(folder: str | Path, *, shared: bool = False) -> Iterator[None]:
    """Lock `folder`, which need not exist, until the context ends; the same thread may enter again.

    shared: for reading, together with other readers. Under torchrun the first process holds the lock for all.

    Raises:
        OutputError: another process or another thread holds it, or a folder to write cannot be written.
    """
    if rank_and_world()[0] > 0:
        yield
        return
    path = Path(os.path.realpath(folder))
    if not shared:
        refuse_place(folder)
    with _guard:
        held = _locks.get(path)
        if held is not None and (held.thread != threading.get_ident() or (held.shared and not shared)):
            raise OutputError(_busy(Path(folder), "another thread of this process"))
        if held is None:
            made = [] if shared else [parent for parent in path.parents if not parent.exists()]
            handle, file = _open(path, Path(folder), shared)
            held = _locks[path] = _Lock(threading.get_ident(), shared, 0, handle, file, made)
        held.times += 1
    try:
        yield
    finally:
        with _guard:
            held.times -= 1
            if not held.times:
                del _locks[path]
                _release(held)


@contextmanager
def at_work(
    out: str | Path, doing: str, lower: str, inputs: Iterable[str | Path] = (), keeps: Iterable[str] | None = None
) -> Iterator[None]:
    """Guard a function that fills a folder: the folder must be apart from the inputs, is locked, and a full disk or
    memory becomes an error with a remedy.

    Args:
        doing, lower: for the message if memory runs out: what was being done, and which settings to lower.
        inputs: folders that are read, see `refuse_place`.
        keeps: patterns of a folder that is filled step by step, see `refuse_others_folder`.
    """
    refuse_place(out, inputs)
    if keeps is not None:
        refuse_others_folder(Path(out), keeps)
    began = time.monotonic()
    with out_of_memory(doing, lower), explained(out), locked(out):
        LOG.info("%s: %s", doing, out)
        yield
        LOG.info("%s: %s: done after %s", doing, out, duration(time.monotonic() - began))


def _open(path: Path, named: Path, shared: bool) -> tuple[int, Path | None]:
    """A handle that holds the lock (-1: no lock is possible here), and the file to remove at the end."""
    file, how = path.with_name(f".{path.name}.lock"), fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    for _ in range(ATTEMPTS):
        try:
            if not shared:
                make_folder(file.parent)
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno == errno.ENOENT and not shared:
                continue  # the previous holder removed the folder made for it
            if error.errno in READ_ONLY and path.is_dir():  # lock the folder itself
                file, handle = path, os.open(path, os.O_RDONLY)
            elif shared and error.errno != errno.ELOOP:
                return -1, None
            else:
                raise cannot_write(file if error.errno == errno.ELOOP else named, error) from None
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
            if file == path:
                return handle, None
            _refuse_foreign(handle, file)
            if _same(handle, file):  # else the previous holder removed it between our two calls
                with suppress(OSError):  # on a full disk the file stays empty but still locks
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return handle, file
        except BlockingIOError:
            holder = "another process" if file == path else _holder(handle)
            os.close(handle)
            raise OutputError(_busy(named, holder)) from None
        except OSError as error:
            os.close(handle)
            if error.errno in NO_LOCKS:
                return -1, None
            raise cannot_write(file, error) from None
        except BaseException:  # interrupted: this process must not lock itself out if it continues
            os.close(handle)
            raise
        os.close(handle)
    raise OutputError(f"{file}: cannot be locked: it is removed again and again; name another folder")


def _release(held: _Lock) -> None:
    """Remove the lock file, unless others share it, and release the lock."""
    if held.handle < 0:
        return
    if held.file is not None and _same(held.handle, held.file):
        with suppress(OSError):
            if held.shared:
                fcntl.flock(held.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.file.unlink()
    with suppress(OSError):
        for folder in held.made:  # made for the lock; kept if they hold anything else
            folder.rmdir()
    os.close(held.handle)


def _same(handle: int, file: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _refuse_foreign(handle: int, file: Path) -> None:
    """Raise OutputError if the file is not a lock file and must not be truncated: symbolic links are not followed, but
    it may be a hard link, or an earlier file of that name."""
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or os.pread(handle, 8, 0) not in (b"", MARK):
        raise OutputError(f"{file}: is not a lock file of vlmgraft; remove it, or name another folder")


def _holder(handle: int) -> str:
    text = os.pread(handle, 200, 0).decode(errors="replace").strip()
    return text if text and text.isprintable() else "another process"


def _busy(folder: Path, holder: str) -> str:
    return f"{folder}: {holder} is at work there; wait until it is done, or name another folder"
