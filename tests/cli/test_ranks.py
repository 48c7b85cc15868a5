"""The command `ranks`: bands of directions over λ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.storage.jsonl import read_rows

Run = Callable[..., Any]


def test_ranks(vlmgraft: Run, recipe: Callable[..., Path], tmp_path: Path) -> None:
    asked = ("ranks", recipe("ta", name="task_arithmetic"), "--bands", "2", "--scale", "1", "--samples", "4")
    ran = vlmgraft(*asked, "--by", "energy", "--out", tmp_path / "r", "--quiet")
    assert ran.code == 0 and "2 of 2" in ran.out
    assert len(list(read_rows(tmp_path / "r" / "ranks.jsonl"))) == 4


def test_options_reach_the_measurement(vlmgraft: Run, stand_in: Run) -> None:
    asked = stand_in("vlmgraft.analysis.rank_bands", "ranks", [])
    words = ("ranks", "r.yaml", "-o", "out", "--bands", "3", "--scale", "0.5:1.5:0.5", "--by", "energy", "-q", "--json")
    ran = vlmgraft(*words, "--samples", "6", "--drift", "d.jsonl", "--data", "lab", "--seed", "4", "--set", "layers=0")
    assert ran.code == 0 and json.loads(ran.out) == {"rows": []}
    ((recipe, out, data), options) = asked[0]
    assert (recipe, out, options.pop("scales")) == (Path("r.yaml"), Path("out"), pytest.approx([0.5, 1.0, 1.5]))
    assert options == {"overrides": ["layers=0"], "bands": 3, "by": "energy", "resume": False, "progress": None}
    assert (data.samples, data.drift, data.data) == (6, "d.jsonl", ("lab:4",)), "the lab's questions of that seed"
    refused = vlmgraft("ranks", "r.yaml", "-o", "out", "--by", "size")
    assert refused.code == 2 and "--by" in refused.err
