"""Folders that are whole under their name or absent: made hidden beside it, flushed to disk, and renamed.

The hidden folder is `.NAME.partial-PID`, or `.NAME.partial-KEY` if it can be continued, and locked while its writer
lives. What a killed writer left is removed by the next one of the same output; what can be continued, once there is an
output that makes it pointless.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from vlmgraft.durable import lock, remove_folder_if_dead
from vlmgraft.errors import OutputError, VlmgraftError
from vlmgraft.folders import flush_folder, make_folder
from vlmgraft.resources import cannot_write

HERE = -100  # AT_FDCWD
NO_REPLACE, EXCHANGE = 1, 2
OLD = ".old"
UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}
"""What a file system answers that cannot exchange two names."""


def refuse_output(out: Path, inputs: Sequence[Path] = ()) -> None:
    """Raise OutputError when `out` is one of `inputs`, lies inside one, or exists."""
    real = out.resolve()
    for path in inputs:
        if real == path.resolve() or path.resolve() in real.parents:
            raise OutputError(f"{out}: is the input {path} or lies inside it; choose another output folder")
    if out.is_symlink() or out.exists():
        raise OutputError(f"{out}: exists; choose another output folder or remove it")
    if not real.parent.is_dir() and real.parent.exists():
        raise OutputError(f"{out}: {real.parent} is not a folder")


@contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the name `out` after a clean exit and is removed otherwise; see `Publication`."""
    with Publication(out, replace=replace) as publication:
        yield publication.folder


class Publication:
    """Context manager over the hidden folder that becomes `out`.

    Args:
        key: of what is being made. An interrupted folder of the same key is kept and continued; not one whose inputs
            were refused, as the next run would meet the same refusal, unless `keep_refused`.
        anew: begin with nothing, and keep what is made only where a person stops it.
        replace: take the place of a folder that exists, in one step: there is always the old one or the new one.
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
        self.folder = out.with_name(f".{out.name}.partial-{key or os.getpid()}")
        self._lock = -1

    def __enter__(self) -> Publication:
        try:
            make_folder(self.out.parent)
            sweep_folders(self.out)
            self._lock = self._made()
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
        hopeless = kind is not None and issubclass(kind, VlmgraftError) and not issubclass(kind, OutputError)
        keep = self.key is not None and (self.keep_refused or not hopeless)
        keep = keep and not (self.anew and kind is not None and issubclass(kind, Exception))
        try:
            if kind is None:
                self._publish()
                keep = False
        finally:
            if not keep:
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)

    def _made(self) -> int:
        """The folder, made or found, and a lock on it; made again if a sweep came between the two."""
        while True:
            self.folder.mkdir(exist_ok=self.key is not None)
            handle = os.open(self.folder, os.O_RDONLY)
            try:
                lock(handle, wait=self.key is None)
            except OSError:
                os.close(handle)
                raise
            if os.fstat(handle).st_nlink:
                return handle
            os.close(handle)

    def _publish(self) -> None:
        """Put everything on disk, and give the folder its name."""
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
    """Remove hidden folders of `out` whose writers are dead; of those that can be continued only if `out` is there."""
    prefix = f".{out.name}.partial-"
    with os.scandir(out.parent) as entries:
        found = [Path(entry) for entry in entries if entry.name.startswith(prefix) and entry.is_dir()]
    for folder in found:
        process = folder.name[len(prefix) :]
        if process.endswith(OLD) and not out.exists():
            folder.rename(out)  # killed between the two steps of `_exchange`
        elif finished or (len(process) < 12 and process.isdigit()):
            remove_folder_if_dead(folder)


def flush_tree(folder: Path) -> None:
    """Put a folder and everything in it on disk; raises OSError."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            handle = os.open(Path(place, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        flush_folder(Path(place))


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry)
        else:
            Path(entry).unlink()


def _rename(folder: Path, out: Path) -> None:
    """Rename, but never over something: a plain rename would replace an empty folder in silence."""
    try:
        if not _renameat2(folder, out, NO_REPLACE):
            if out.exists() or out.is_symlink():
                raise FileExistsError
            folder.rename(out)
    except FileExistsError:
        raise OutputError(f"{out}: appeared while it was being written; nothing was replaced") from None


def _exchange(folder: Path, out: Path) -> None:
    """Give `folder` the name of `out` and the other way round, in one step where the file system can."""
    if not _renameat2(folder, out, EXCHANGE):
        aside = folder.with_name(folder.name + OLD)
        out.rename(aside)
        folder.rename(out)
        aside.rename(folder)


def _renameat2(one: Path, other: Path, flags: int) -> bool:
    """Linux's renameat2; False where system or file system do not know it. Raises OSError."""
    with suppress(AttributeError):
        call = ctypes.CDLL(None, use_errno=True).renameat2
        if call(HERE, os.fsencode(one), HERE, os.fsencode(other), flags) == 0:
            return True
        number = ctypes.get_errno()
        if number not in UNKNOWN:
            raise OSError(number, os.strerror(number), str(other))
    return False
