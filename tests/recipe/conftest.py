"""Makes this folder's helper modules importable, and the method of one of them known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vlmgraft.methods import METHODS

sys.path.insert(0, str(Path(__file__).parent))

from sample_method import Sample


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "sample", Sample)
