"""What the children of test_kill.py run, in a module that a fresh process can import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import vlmgraft as vg


def merge_and_note(recipe: dict[str, Any], folder: Path) -> None:
    """Merge, and note every step of progress in a file before going on."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    note = lambda done, total, what: os.write(log, f"{what} {done} {total}\n".encode())  # noqa: E731
    vg.merge(recipe, folder / "merged", workdir=folder / "work", resume=True, progress=note)
