"""The count of a card's memory runs, and the cost model agrees with what it counted of 72B and 32B."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlmgraft.costs.cost import Work, stages
from vlmgraft.costs.models import MODELS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_quick_counts_more_than_the_shards_and_less_than_the_models(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "sharded.py"), "--quick", "--out", str(tmp_path / "r.json")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    low, full, *offloaded = json.loads((tmp_path / "r.json").read_text())
    assert low["weights"] == full["weights"] and low["factors"] < full["factors"] / 8
    for row in (low, full):
        assert row["weights"] < row["answering"] and row["matching"] < row["answering"]
        assert row["weights"] + row["factors"] < row["gates"] == pytest.approx(row["formula"], rel=0.15)
    assert low["answering"] == full["answering"] and low["gates"] < full["gates"]
    for row in offloaded:  # layers are in the host's memory, also while they are put in place, and come one by one
        assert row["factors"] == 0 and row["weights"] <= row["loading"] < row["weights"] + 2**20
        assert row["weights"] < low["weights"] and row["weights"] + row["host"] > 3 * 2**20
        assert row["weights"] < row["gates"] == pytest.approx(row["formula"], rel=0.15)
        assert row["gates"] < row["weights"] + row["host"]


def test_the_cost_model_has_what_was_counted() -> None:
    rows = json.loads((BENCHMARKS / "results" / "sharded.json").read_text())
    assert [(row["model"], row["cards"], row["limit"]) for row in rows] == [
        ("72B", 8, 45.0), ("72B", 8, 70.0), ("32B", 1, 74.0), ("32B", 1, 74.0)
    ]  # fmt: skip
    for row in rows:
        (model,) = (model for model in MODELS if model.name == f"Qwen2.5-VL-{row['model']}")
        work = Work(rank=row["rank"], gpus=row["cards"], offload="host" in row)
        predicted = {stage.name: stage.memory for stage in stages(model, work)}
        near = 0.08 if work.offload else 0.05  # little is kept: gradients of the layer that runs show
        assert predicted["gates"] == pytest.approx(row["gates"], rel=near)
        assert predicted["teacher"] == pytest.approx(row["answering"], rel=near)
        assert max(row[phase] for phase in ("matching", "answering", "gates")) <= row["limit"] * 2**30
