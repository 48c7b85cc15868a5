"""`--force`: an output that vlmgraft wrote steps aside while the new one is made, and comes back if that fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmgraft.errors import OutputError

OURS = {
    "receipt.json", "factors.json", "gates.json", "run.json", "comparison.json", "knockout.jsonl", "ranks.jsonl",
    "sweep.jsonl", "results.jsonl", "training.json",
}  # fmt: skip
"""A folder that holds one of these files was written by a command."""


@contextmanager
def replacing(out: Path) -> Iterator[None]:
    """Move `out` aside for the time of the block; remove it afterwards, or put it back where the block raises.

    What a killed run left aside is put back by the next one.

    Raises:
        OutputError: `out` is a link or a file, or a folder that holds nothing that vlmgraft writes.
    """
    aside = out.with_name(f".{out.name}.replaced")
    if aside.is_dir() and not out.exists():
        aside.rename(out)
    if not out.exists() and not out.is_symlink():
        yield
        return
    if out.is_symlink() or not out.is_dir() or not _ours(out):
        raise OutputError(f"{out}: --force replaces folders that vlmgraft wrote, and this is none; remove it yourself")
    shutil.rmtree(aside, ignore_errors=True)
    out.rename(aside)
    try:
        yield
    except BaseException:
        if not out.exists():
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _ours(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return not names or bool(names & OURS)
