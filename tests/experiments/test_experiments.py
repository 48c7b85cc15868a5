"""The bench of experiments on the embedded trio: budgets that are met, rows that are kept, prompts that differ."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.lab.experiments import QUICK, Bench, Job, point_of, truncated
from experiments.lab.experiments_jobs import EXPERIMENTS, SPECTRA
from vlmgraft.errors import CheckpointError, RecipeError
from vlmgraft.lab.world import PERCEPTION
from vlmgraft.spectral.gates import constant_gates
from vlmgraft.storage.jsonl import read_rows

pytestmark = pytest.mark.filterwarnings("ignore:kl_budget is measured")


@pytest.fixture(scope="module")
def bench(trio: Path) -> Bench:
    return Bench(trio, QUICK, report=lambda _: None)


def test_a_budget_is_met_by_any_update_without_training(bench: Bench) -> None:
    budget = 0.003
    for rule in ("truncate 8", "STAR η 0.8"):
        updates = {name: f.update(SPECTRA[rule](f.s)) for name, f in bench.comparison.factors.items()}
        weights, notes = bench.at_budget(updates, budget)
        assert 0.97 * budget < bench.comparison.controlled.keep_kl(weights) <= budget
        assert notes["scale"] > 0


def test_open_gates_are_task_arithmetic_and_truncated_ones_its_first_directions(bench: Bench) -> None:
    factors = bench.comparison.factors
    for chosen in (factors, truncated(factors, 4)):
        gates = constant_gates({name: len(f.s) for name, f in chosen.items()}, math.inf, 1.0)
        folded, added = bench.matrices(gates, chosen), bench.comparison.task_arithmetic(1.0, chosen)
        assert all(torch.allclose(folded[name], added[name], atol=1e-5) for name in added)


def test_gates_on_truncated_factors_leave_the_distiller_alone(bench: Bench) -> None:
    gates = bench.learn("energy", truncated(bench.comparison.factors, 2), kl_budget=0.003)
    assert {len(logits) for logits in gates.logits.values()} == {2}
    whole = bench.learn("energy", inject_weight=0.1, steps=0)
    assert all(len(whole.logits[name]) == len(f.s) for name, f in bench.comparison.factors.items())


def test_kl_is_controlled_and_reported_on_different_prompts(bench: Bench) -> None:
    comparison = bench.comparison
    drawn = [comparison.distiller.targets, comparison.distiller.held_out_targets, bench.fresh]
    drawn.append(comparison.controlled.held_out_targets)
    pixels = [{image.tobytes() for image in _pixels(targets)} for targets in drawn if targets is not None]
    assert len(pixels) == 4 and all(pixels)
    for index, one in enumerate(pixels):
        assert all(one.isdisjoint(other) for other in pixels[index + 1 :])


def _pixels(targets: Any) -> list[Any]:
    return [batch.inputs["pixel_values"].reshape(len(batch.predicts), -1).numpy()[row]
            for batch in targets.batches for row in range(len(batch.predicts))]  # fmt: skip


def test_a_row_tells_the_kl_and_its_tail(bench: Bench) -> None:
    weights = bench.comparison.task_arithmetic(1.0)
    row = bench.measure(weights, notes={"scale": 1.0})
    assert row["kl"] == pytest.approx(bench.comparison.distiller.keep_kl(weights), rel=1e-5)
    assert 0.01 < row["kl_worst_share"] <= 1 and row["notes"] == {"scale": 1.0}
    assert {task: len(bits) for task, bits in row["right"].items()} == {"sum": 12, **dict.fromkeys(PERCEPTION, 4)}
    assert bench.measure(None)["kl"] == pytest.approx(0, abs=1e-7)


def test_rows_are_kept_and_not_made_again(bench: Bench, tmp_path: Path) -> None:
    made: list[int] = []

    def job(number: int) -> Job:
        return Job("any", {"number": number}, lambda: made.append(number) or {"notes": {"number": number}})

    path = tmp_path / "rows" / "a.jsonl"
    bench.run([job(1), job(2)], path)
    path.write_text(path.read_text() + '{"method": "any", "setting": {"num')  # killed while writing
    rows = bench.run([job(1), job(2), job(3)], path)
    assert made == [1, 2, 3]
    assert [row["notes"]["number"] for row in rows] == [1, 2, 3]
    assert [row["setting"]["number"] for row in list(read_rows(path))[1:]] == [1, 2, 3]


def test_a_file_of_another_trio_or_other_sizes_is_refused(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"about": {"trio": 7, "sizes": {}}}\n')
    with pytest.raises(RecipeError, match=r"a\.jsonl"):
        bench.run([], tmp_path / "a.jsonl")
    with pytest.raises(CheckpointError, match="lab train"):
        Bench(tmp_path)


def test_names_of_rows_are_unique(bench: Bench) -> None:
    keys = [job.key for name in ("rank", "weight", "spectra", "front") for job in EXPERIMENTS[name](bench, (0.1, 0.2))]
    curve = {key for key in keys if "scale" in key or "VLM" in key}
    rest = [key for key in keys if key not in curve]
    assert len(rest) == len(set(rest)) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table", "front"])
def test_an_experiment_gives_a_row_per_job(bench: Bench, name: str, tmp_path: Path) -> None:
    jobs = EXPERIMENTS[name](bench, (0.003,))
    rows = bench.run(jobs, tmp_path / "rows.jsonl")
    assert [row["method"] for row in rows] == [job.method for job in jobs]
    for row in rows:
        if "right" in row:
            assert len(point_of(row).marks.right["sum"]) == QUICK.sums and row["kl"] >= 0
        else:
            assert [point["budget"] for point in row["notes"]["front"]] == row["setting"]["budgets"]
