"""Atomic publication of folders: they are made under a hidden name, flushed to disk, and renamed.

The hidden folder is `.NAME.partial-PID`, or `.NAME.partial-KEY` if it can be resumed, and locked while its writer
lives. The next writer of the same output removes what killed writers left, but a resumable folder only once there is an
output that makes it obsolete.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from vlmgraft.errors import OutputError, VlmgraftError
from vlmgraft.storage.files import flush_folder, lock, make_folder, remove_folder_if_dead
from vlmgraft.storage.resources import cannot_write

AT_FDCWD = -100
NO_REPLACE, EXCHANGE = 1, 2
OLD = ".old"
UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}
"""Errors of file systems that cannot exchange two names."""


@contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the name `out` after a clean exit and is removed otherwise; see `Publication`."""
    with Publication(out, replace=replace) as publication:
        yield publication.folder


def partial_folder(out: Path, key: str) -> Path:
    """The hidden folder in which `out` is made."""
    return out.with_name(f".{out.name}.partial-{key}")


class Publication:
    """Context manager over the hidden folder that becomes `out`.

    Args:
        key: identifies the content. An interrupted folder with the same key is kept and resumed. After refused inputs
            it is kept only with `keep_refused`, since the next run would refuse them again.
        anew: start from nothing; what is written is kept only if the user interrupts the run.
        replace: replace an existing folder in one step: there is always the old one or the new one.
    Raises:
        OutputError: `out` appeared, cannot be written, or another process is writing the same hidden folder.
    """

    def __init__(
        self,
        out: Path,
        key: str | None = None,
        *,
        replace: bool = False,
        keep_refused: bool = False,
        anew: bool = False,
    ) -> None:
        self.out, self.key, self.replace, self.keep_refused, self.anew = out, key, replace, keep_refused, anew
        self.folder = partial_folder(out, key or str(os.getpid()))
        self._lock = -1

    def __enter__(self) -> Publication:
        try:
            make_folder(self.out.parent)
            sweep_folders(self.out)
            self._lock = self._acquire()
            if self.anew:
                _empty(self.folder)
        except BlockingIOError:
            raise OutputError(f"{self.folder}: another process is writing it") from None
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        refused = kind is not None and issubclass(kind, VlmgraftError) and not issubclass(kind, OutputError)
        keep = self.key is not None and (self.keep_refused or not refused)
        keep = keep and not (self.anew and kind is not None and issubclass(kind, Exception))
        try:
            if kind is None:
                self._publish()
                keep = False
        finally:
            if not keep:
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)

    def _acquire(self) -> int:
        """Make the folder, or take over one with the same key, and lock it; retried if a sweep removes it meanwhile."""
        while True:
            self.folder.mkdir(exist_ok=self.key is not None)
            handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                lock(handle, wait=self.key is None)
            except OSError:
                os.close(handle)
                raise
            if os.fstat(handle).st_nlink:
                return handle
            os.close(handle)

    def _publish(self) -> None:
        """Flush everything to disk, and rename the folder."""
        if not os.path.samestat(os.fstat(self._lock), self.folder.lstat()):
            raise OutputError(f"{self.folder}: was replaced while it was written; nothing was published")
        try:
            flush_tree(self.folder)
            if self.replace and self.out.exists():
                _exchange(self.folder, self.out)
            else:
                _rename(self.folder, self.out)
            flush_folder(self.out.parent)
        except OSError as error:
            raise cannot_write(self.out, error) from None
        sweep_folders(self.out, finished=True)


def sweep_folders(out: Path, *, finished: bool = False) -> None:
    """Remove hidden folders of `out` whose writers are dead; resumable ones only if `out` is `finished`."""
    prefix = f".{out.name}.partial-"
    with os.scandir(out.parent) as entries:
        leftovers = [
            Path(entry) for entry in entries if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False)
        ]
    for folder in leftovers:
        process = folder.name[len(prefix) :]
        if process.endswith(OLD) and not out.exists():
            folder.rename(out)  # killed between the two steps of `_exchange`
        elif finished or (len(process) < 12 and process.isdigit()):
            remove_folder_if_dead(folder)


def flush_tree(folder: Path) -> None:
    """Flush a folder and everything in it to disk; raises OSError, also if it contains a link."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            handle = os.open(Path(parent, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        flush_folder(Path(parent))


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry)
        else:
            Path(entry).unlink()


def _rename(folder: Path, out: Path) -> None:
    """Rename without replacing anything: a plain rename would silently replace an empty folder."""
    try:
        if not _renameat2(folder, out, NO_REPLACE):
            if out.exists() or out.is_symlink():
                raise FileExistsError
            folder.rename(out)
    except FileExistsError:
        raise OutputError(f"{out}: appeared while it was being written; nothing was replaced") from None


def _exchange(folder: Path, out: Path) -> None:
    """Exchange the names of `folder` and `out`, in one step if the file system can."""
    if not _renameat2(folder, out, EXCHANGE):
        aside = folder.with_name(folder.name + OLD)
        out.rename(aside)
        folder.rename(out)
        aside.rename(folder)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux's renameat2; False if the system or the file system does not support it. Raises OSError."""
    with suppress(AttributeError):
        call = ctypes.CDLL(None, use_errno=True).renameat2
        if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) == 0:
            return True
        number = ctypes.get_errno()
        if number not in UNKNOWN:
            raise OSError(number, os.strerror(number), str(target))
    return False
