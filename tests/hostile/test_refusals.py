"""Everything in the table is refused by the command line: exit code 2; file, field and remedy in one printable line."""

from __future__ import annotations

import logging
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lies import CASES
from places import Case, Place

REMEDY = re.compile(
    r"; (?:download|mend|give|write|rename|take|remove|put|keep|replace|shrink|look|shard|drop|a recipe is|name)"
    r"|; no model|counted from 0|is not .all."
    r"|; at most|take|write|give|Write|Convert|merge it|Valid keys|did you mean|shared are|methods:|must be|should be"
    r"|Input|such as"
)
MEMORY = 500_000_000
"""Bytes by which one case may raise the process's peak: the limit of every refusal."""
SECONDS = 10
"""Processor time of one case, first imports included; what they took is in docs/reliability.md (`-s` prints it)."""


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_it_is_refused(
    case: Case, vlmgraft: Callable[..., Any], trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = case.prepare(Place(tmp_path, trio))
    monkeypatch.setattr(logging, "raiseExceptions", False)  # transformers logs to the stream of an earlier test
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    ran = vlmgraft(*arguments)
    used = time.process_time() - began
    print(f"refused: {case.name}: {used:.2f} s")
    assert ran.code == 2, ran.err
    said = ran.err.splitlines()[-1]
    assert said.startswith("vlmgraft: ") and said.isprintable() and "Traceback" not in ran.err
    assert case.file in said and case.field in said and REMEDY.search(said), said
    assert len(said) < 2_100
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MEMORY
    assert used < SECONDS
