"""Folders whose names are on disk: what a file system keeps of a name through a power cut, it keeps after a flush."""

from __future__ import annotations

import errno
import os
from pathlib import Path

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
