"""Makes this folder's helper modules importable; the small jobs, with factors and gates for those that need some."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from jobs import Job, Whole, make_jobs


@pytest.fixture(scope="session")
def small_jobs(
    trio: Path, image_calibration: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Callable[[Path], Job]]:
    """One small run of every command that writes, by name."""
    import vlmgraft as vg

    inputs = tmp_path_factory.mktemp("inputs")
    jobs = make_jobs(trio, image_calibration, inputs)
    recipe = inputs / "frism.yaml"
    vg.decompose(recipe, inputs / "factors")
    vg.gates(recipe, inputs / "factors", inputs / "gates")
    return jobs


@pytest.fixture(scope="session")
def whole(small_jobs: dict[str, Callable[[Path], Job]], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """What the small jobs leave if nothing disturbs them."""
    return Whole(small_jobs, tmp_path_factory.mktemp("whole"))
