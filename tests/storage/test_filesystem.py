"""Folders whose names are on disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vlmgraft.storage.filesystem import flush_folder, make_folder


def test_a_file_system_that_cannot_flush_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some over a network answer EINVAL; a full disk is still an error."""
    answer = errno.EINVAL

    def fsync(handle: int) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(os, "fsync", fsync)
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    answer = errno.ENOSPC
    with pytest.raises(OSError, match="No space"):
        make_folder(tmp_path / "c")


def test_each_new_folder_is_flushed_into_the_one_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(Path(f"/proc/self/fd/{handle}").resolve()))
    make_folder(tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a" / "b")
    assert len(flushed) == 2
    flush_folder(tmp_path / "a" / "b")
    assert flushed[2:] == [tmp_path / "a" / "b"]
