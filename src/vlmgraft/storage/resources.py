"""Plain errors when disk or memory runs out: which file, what happened, what to do. Loads no torch."""

from __future__ import annotations

import errno
import gc
import os
import re
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmgraft.errors import OutputError, VlmgraftError

REMEDIES = {
    errno.ENOSPC: "make room, or name a folder on another disk",
    errno.EDQUOT: "make room in your quota, or name a folder on another disk",
    errno.EFBIG: "files may not be so large here: lower output.shard_size, raise `ulimit -f`, or use another disk",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "change its permissions, or name a folder that can be written",
    errno.EPERM: "change its permissions, or name a folder that can be written",
    errno.ENOTDIR: "a file is where a folder should be: remove it, or name another folder",
    errno.ELOOP: "a link is in its place: remove it, or name another folder",
    errno.EEXIST: "something is in its place: remove it, or name another folder",
    errno.EIO: "the disk reports damage: use another one",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EMFILE: "raise `ulimit -n`",
}
"""What to do about a write error, by its number."""
ONLY_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Error numbers that only writing can cause."""

_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory|alloc(ation)?_failed", re.IGNORECASE
)
_NUMBER = re.compile(r"\(os error (\d+)\)")


def free_memory() -> int:
    """Bytes of available memory, including reclaimable file cache if the system reports it; one gigabyte if the system
    reports nothing."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (available := re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())):
        return 1024 * int(available[1])
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 1 << 18
    return pages * os.sysconf("SC_PAGE_SIZE")


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cannot_write(path: str | Path, error: OSError) -> OutputError:
    """The error to raise if `path` cannot be written: why, and what to do."""
    remedy = REMEDIES.get(error.errno or 0, "name another folder")
    return OutputError(f"{path}: cannot be written ({error.strerror or error}); {remedy}")


class _TimeIsUp(BaseException):
    """Not an Exception: libraries would catch that and continue."""


@contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Limit short work on untrusted input to `seconds` of processor time and `memory` bytes more than the process has.

    Works in the main thread only, where signals arrive and nobody else changes limits; memory is limited only on Linux.
    Elsewhere nothing is limited. Raises TimeoutError; an allocation beyond the limit raises MemoryError.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGVTALRM, stop)
    limits = _limit_memory(memory)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except _TimeIsUp:
        raise TimeoutError(f"more than {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        if limits is not None:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def _limit_memory(more: int) -> tuple[int, int] | None:
    """Limit the process to `more` bytes of additional addresses; the limits before, or None if that is impossible."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft, hard = before = resource.getrlimit(resource.RLIMIT_AS)
        wanted = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *(limit for limit in (soft, hard) if limit >= 0)]), hard))
    except (OSError, ValueError):
        return None
    return before


@contextmanager
def explained(out: str | Path) -> Iterator[None]:
    """Turn errors of a full or read-only disk into OutputError naming the file, or else `out`.

    Read errors pass unchanged. Errors of libraries that write files themselves are recognised: safetensors gives the
    system's error number in its message, torch.save gives none.
    """
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename  # of two names, as in a copy, the second is written
        if error.errno in ONLY_WRITING or _inside(named, Path(out)):
            raise cannot_write(os.fsdecode(named) if isinstance(named, str | bytes) else out, error) from error
        raise
    except VlmgraftError:
        raise
    except Exception as error:
        cause = _in_a_library(error)
        if cause is None:
            raise
        raise cannot_write(out, cause) from error


def _inside(name: object, out: Path) -> bool:
    """Whether a file is `out`, lies in it, or is one of its hidden neighbours (`.NAME.partial-…`)."""
    if not isinstance(name, str | bytes | os.PathLike):
        return False
    path, output = Path(os.fsdecode(name)).resolve(), Path(out).resolve()
    hidden = f".{output.name}."
    return any(
        part == output or (part.parent == output.parent and part.name.startswith(hidden))
        for part in (path, *path.parents)
    )


def _in_a_library(error: Exception) -> OSError | None:
    """The system's error behind one of safetensors or torch.save, if it is a write error."""
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (match := _NUMBER.search(text)):
        number = int(match[1])
        return OSError(number, os.strerror(number)) if number in ONLY_WRITING else None
    if isinstance(error, RuntimeError) and "PytorchStreamWriter failed" in text:
        return OSError(errno.ENOSPC, "the file could not be completed, as on a full disk")
    return None


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's MemoryError, torch's error on a GPU, or its plain RuntimeError on the CPU."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_MEMORY.search(str(error))))


@contextmanager
def out_of_memory(doing: str, remedy: str) -> Iterator[None]:
    """Turn errors of exhausted memory into VlmgraftError: what was being done, and what to lower."""
    try:
        yield
    except VlmgraftError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        why = str(error).split("\n")[0][:300]
        raise VlmgraftError(f"out of memory while {doing}: {remedy}" + (f" ({why})" if why else "")) from error


@contextmanager
def collection_paused() -> Iterator[None]:
    """Turn the garbage collector off inside the context; for short work that makes many live objects.

    With the collector, making 100,000 rows takes half as long again.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
