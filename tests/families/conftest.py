"""The zoo: a tiny VLM, donor and bases of every family, made once per session and only when asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from zoo import CASES, Trio, build


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trio]:
    """`trio(case)`: the folders of a case of `zoo.CASES`."""
    made: dict[str, Trio] = {}

    def get(case: str) -> Trio:
        if case not in made:
            made[case] = build(CASES[case], tmp_path_factory.mktemp(case))
        return made[case]

    return get
