"""A model on its bench: what a row holds, its log, and a KL where prompts for it are given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_tools import LogitExam

from vlmgraft.analysis.bench import Bench, load_bench
from vlmgraft.analysis.eval_data import EvalData
from vlmgraft.errors import OutputError
from vlmgraft.storage.jsonl import read_json, read_rows

CELLS = [{"id": "a", "factor": 1.0}, {"id": "b", "factor": 0.5}]


def bench_in(folder: Path, model: Any, **options: Any) -> Bench:
    return Bench(model, None, LogitExam(), folder, {"vlm": "v"}, **options)


def test_a_row_has_the_accuracies_by_hand_and_the_kl(vlm_model: Any, tmp_path: Path) -> None:
    bench = bench_in(tmp_path, vlm_model, kl_from=lambda model: 0.25 if model is vlm_model else 0.0)
    row, right = bench.ask(), bench.evaluator(vlm_model)
    shares = {task: sum(marks) / len(marks) for task, marks in right.items()}
    assert row["tasks"] == pytest.approx(shares) and row["kl"] == 0.25
    assert row["reasoning"]["mean"] == pytest.approx(shares["sum"])
    assert row["perception"]["mean"] == pytest.approx((shares["colour"] + shares["read"]) / 2)
    assert row["right"]["read"] == "".join("01"[mark] for mark in right["read"])
    assert bench_in(tmp_path, vlm_model).ask()["kl"] is None


def test_parameters_are_the_models_own_by_role(vlm_model: Any, tmp_path: Path) -> None:
    parameters = bench_in(tmp_path, vlm_model).parameters
    owned = {id(parameter) for parameter in vlm_model.parameters()}
    assert "layers.0.mlp.up_proj.weight" in parameters and all(id(one) in owned for one in parameters.values())


def test_cells_are_measured_once_and_found_again_by_the_same_exam(vlm_model: Any, tmp_path: Path) -> None:
    asked: list[str] = []

    def figures(cell: Mapping[str, Any]) -> dict[str, Any]:
        asked.append(cell["id"])
        return {"double": 2 * cell["factor"]}

    rows = list(bench_in(tmp_path, vlm_model).measure("cells", ("id",), CELLS[:1], figures))
    assert rows == [{"id": "a", "factor": 1.0, "double": 2.0}]
    assert read_json(tmp_path / "cells.run.json") == {"vlm": "v", "exam": "logits"}
    with pytest.raises(OutputError, match="--resume"):
        list(bench_in(tmp_path, vlm_model).measure("cells", ("id",), CELLS, figures))
    rows = list(bench_in(tmp_path, vlm_model, resume=True).measure("cells", ("id",), CELLS, figures))
    assert asked == ["a", "b"] and [row["double"] for row in rows] == [2.0, 1.0]
    assert list(read_rows(tmp_path / "cells.jsonl")) == rows


def test_a_loaded_bench_has_the_model_of_the_folder_and_the_questions(trio: Path, tmp_path: Path) -> None:
    bench = load_bench(trio / "vlm", EvalData(samples=40), tmp_path, settings={"vlm": "v"}, resume=True)
    assert bench.resume and bench.settings["vlm"] == "v" and bench.evaluator.label.startswith("lab")
    assert bench.kl_from is not None
    before = bench.kl_from(bench.model)
    with torch.no_grad():
        bench.parameters["layers.1.mlp.down_proj.weight"].mul_(0.5)
    assert before == pytest.approx(0, abs=1e-6) and bench.kl_from(bench.model) > 0.001
