"""The zoo's cases in the place of the embedded trio."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from zoo import Trio


@pytest.fixture(scope="session")
def trio(zoo: Callable[[str], Trio]) -> Callable[[str], Trio]:
    """`trio(case)`: the folders of a case of `zoo.CASES`."""
    return zoo
