"""Few files are open at a time, and none that is in use is closed."""

from __future__ import annotations

import os
from pathlib import Path

from vlmgraft.checkpoint.handles import Handles


def test_the_one_unused_for_longest_is_closed(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(4)]
    for file in files:
        file.write_text(file.name)
    handles = Handles(os.O_RDONLY, most=2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with handles.of(files[0]) as first:
        for file in files[1:]:
            with handles.of(file) as handle:
                assert os.pread(handle, 9, 0) == file.name.encode()
        assert os.pread(first, 9, 0) == b"0", "in use: still open"
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 2
    handles.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
