"""The command `decompose`: a store of every matrix, what it kept, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.spectral.factor_store import open_store

Run = Callable[..., Any]


@pytest.fixture
def frism(recipe: Callable[..., Path]) -> Path:
    return recipe("frism", name="frism", inject_weight=0.1, calibration={"data": "lab", "samples": 4})


def test_a_store_of_every_matrix_and_how_it_goes_on(vlmgraft: Run, frism: Path, tmp_path: Path) -> None:
    """Four layers of four projections of attention and three of the mlp, of full rank."""
    ran = vlmgraft("decompose", frism, "-o", tmp_path / "factors", "--quiet", "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert (said["out"], said["matrices"]) == (str(tmp_path / "factors"), 4 * (4 + 3))
    assert said["kept"] == pytest.approx(1.0) and len(open_store(tmp_path / "factors")) == 28
    assert len(list((tmp_path / "factors").glob("*.safetensors"))) == 28
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "factors").glob("*.safetensors")}
    again = vlmgraft("decompose", frism, "-o", tmp_path / "factors", "--quiet", "--resume")
    assert again.code == 0 and "28 matrices, 100.0% of ‖τ‖², " in again.out
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_smaller_rank_keeps_less(vlmgraft: Run, frism: Path, tmp_path: Path) -> None:
    ran = vlmgraft(
        "decompose", frism, "-o", tmp_path / "f", "-q", "--json", "--set", "method.rank=1", "--set", "layers=0"
    )
    said = json.loads(ran.out)
    assert said["matrices"] == 7 and 0 < said["kept"] < 0.9


def test_a_method_without_gates_is_refused(vlmgraft: Run, recipe: Callable[..., Path], tmp_path: Path) -> None:
    ran = vlmgraft("decompose", recipe("ta", name="task_arithmetic"), "-o", tmp_path / "factors")
    assert ran.code == 2 and "task_arithmetic" in ran.err and not (tmp_path / "factors").exists()
