"""A row of budgets from one run: met, with warm starts, gone on with after an interruption; and what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import vlmgraft as vg
from tests.distillation.test_learn import recipe_of
from vlmgraft.distillation import front as module
from vlmgraft.distillation.curvature import REACH, within_reach
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.front import FrontPoint, front, moved_to, pareto_front
from vlmgraft.errors import OutputError, RecipeError
from vlmgraft.spectral.gate_store import load_gates
from vlmgraft.spectral.gates import Gates, constant_gates
from vlmgraft.storage.jsonl import read_rows

pytestmark = pytest.mark.filterwarnings("ignore:kl_budget is measured")


@pytest.fixture(scope="module")
def unit(distiller: Distiller) -> float:
    """The KL of half-open gates: a budget that can be met."""
    return distiller.keep_kl(constant_gates({name: len(f.s) for name, f in distiller.factors.items()}, 0.0, 1.0))


def injected(distiller: Distiller, gates: Gates) -> float:
    """‖σ(g) ⊙ s‖² / ‖s‖², from the matrices themselves."""
    parts = [(f.update(gates.open(name) * f.s).square().sum(), f.energy) for name, f in distiller.factors.items()]
    return float(sum(part for part, _ in parts)) / sum(energy for _, energy in parts)


def test_budgets_are_met_and_energy_grows_with_them(distiller: Distiller, unit: float) -> None:
    budgets = [0.25 * unit, unit, 0.5 * unit]
    seen: list[FrontPoint] = []
    front = pareto_front(distiller, budgets, first_steps=30, steps=10, learning_rate=0.1, report=seen.append)
    assert [point.budget for point in front] == sorted(budgets)
    assert [point.budget for point in seen] == sorted(budgets, reverse=True)
    for point in front:
        assert point.held_out_kl == pytest.approx(point.budget, rel=0.05)
        assert distiller.keep_kl(point.gates) == pytest.approx(point.held_out_kl, rel=1e-3)
    energies = [point.energy for point in front]
    assert energies == sorted(energies) and energies[0] < energies[-1]
    assert energies[0] == pytest.approx(injected(distiller, front[0].gates), rel=1e-4)


def test_a_point_starts_from_its_neighbour_moved_to_its_budget(distiller: Distiller, unit: float) -> None:
    """Without steps the smaller budget's gates are the neighbour's, all moved by one constant."""
    low, high = pareto_front(distiller, [0.3 * unit, unit], first_steps=3, steps=0, learning_rate=0.3)
    moves = torch.cat([low.gates.logits[n] - within_reach(high.gates).logits[n] for n in low.gates.logits])
    assert float(moves.std()) < 1e-5 and float(moves.mean()) < 0
    assert 0.9 * low.budget < low.held_out_kl <= low.budget


def test_shifting_keeps_within_the_budget_at_either_end(distiller: Distiller, unit: float) -> None:
    gates = constant_gates({name: len(f.s) for name, f in distiller.factors.items()}, 0.0, 1.0)
    opened = moved_to(distiller, gates, 1e9)
    assert all(float(value.min()) > 11 for value in opened.logits.values())
    assert distiller.keep_kl(moved_to(distiller, gates, unit / 10)) <= unit / 10


def test_logits_within_reach_can_move() -> None:
    gates = Gates({"a": torch.tensor([-math.inf, -1.0, 0.5, math.inf])}, 1.0)
    assert within_reach(gates).logits["a"].tolist() == [-REACH, -1.0, 0.5, REACH]


@pytest.mark.parametrize("budgets", [[], [0.1, 0.0], [-1.0], [0.1, math.nan], [math.inf]])
def test_budgets_that_are_none_are_refused(distiller: Any, budgets: list[float]) -> None:
    with pytest.raises(RecipeError, match="budgets"):
        pareto_front(distiller, budgets)


def test_the_largest_budget_trains_longest_and_the_others_start_from_their_neighbour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Recorder:
        def learn(self, scale: float, **options: Any) -> Gates:
            calls.append((scale, options["kl_budget"], options["steps"], options["inject"], options["start"]))
            return Gates({}, scale, {"held_out_kl": options["kl_budget"], "energy": 0.5})

    monkeypatch.setattr(module, "moved_to", lambda distiller, gates, budget: (gates.settings["held_out_kl"], budget))
    front = pareto_front(Recorder(), [0.1, 0.4, 0.2, 0.1])  # type: ignore[arg-type]
    assert [point.budget for point in front] == [0.1, 0.2, 0.4]
    assert calls == [
        (1.0, 0.4, 100, "energy", 0.0),
        (1.0, 0.2, 50, "energy", (0.4, 0.2)),
        (1.0, 0.1, 50, "energy", (0.2, 0.1)),
    ]
    done = {0.4: Gates({}, 1.0, {"held_out_kl": 0.39, "energy": 0.6})}
    calls.clear()
    pareto_front(Recorder(), [0.2, 0.4], 0.5, donor=object(), done=done)  # type: ignore[arg-type]
    assert calls == [(0.5, 0.2, 50, "donor", (0.39, 0.2))]


def test_a_front_of_budgets_from_one_run_and_after_an_interruption(
    trio: Path, image_calibration: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(trio, image_calibration, granularity="matrix")
    vg.decompose(recipe, tmp_path / "factors")
    budgets = [0.005, 0.02, 0.01]
    points = front(recipe, tmp_path / "factors", tmp_path / "front", budgets)
    rows = list(read_rows(tmp_path / "front" / "front.jsonl"))
    assert [row["budget"] for row in rows] == [point.budget for point in points] == sorted(budgets)
    assert all(0.9 * row["budget"] < row["held_out_kl"] <= row["budget"] for row in rows)
    assert [row["energy"] for row in rows] == sorted(row["energy"] for row in rows)
    again = load_gates(tmp_path / "front" / "0.01")
    assert again.settings["kl_budget"] == 0.01 and again.settings["granularity"] == "matrix"
    stamps = {b: (tmp_path / "front" / f"{b:g}" / "gates.safetensors").stat().st_mtime_ns for b in budgets}
    shutil.rmtree(tmp_path / "front" / "0.005")
    (tmp_path / "front" / "front.jsonl").unlink()
    repeated = front(recipe, tmp_path / "factors", tmp_path / "front", budgets)
    for b in (0.01, 0.02):
        assert (tmp_path / "front" / f"{b:g}" / "gates.safetensors").stat().st_mtime_ns == stamps[b], "made once"
    assert [point.energy for point in repeated] == pytest.approx([point.energy for point in points])
    with pytest.raises(RecipeError, match="budget"):
        front(recipe, tmp_path / "factors", tmp_path / "none", [])
    kept = {path: path.read_bytes() for path in (tmp_path / "front").rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"budgets 0\.005, 0\.01, 0\.02, not 0\.02, 0\.1; name another folder"):
        front(recipe, tmp_path / "factors", tmp_path / "front", [0.02, 0.1])
    with pytest.raises(OutputError, match=r"holds gates of another recipe"):
        front(recipe, tmp_path / "factors", tmp_path / "front", budgets, overrides=["method.seed=7"])
    assert kept == {path: path.read_bytes() for path in (tmp_path / "front").rglob("*") if path.is_file()}
    (tmp_path / "front" / "front.jsonl").unlink()
    with pytest.raises(OutputError, match=r"budgets 0\.005, 0\.01, 0\.02, not 0\.02"):
        front(recipe, tmp_path / "factors", tmp_path / "front", [0.02])


def test_budgets_of_one_folder_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"0\.01 and 0\.0100000001 share the folder 0\.01"):
        front({}, tmp_path / "factors", tmp_path / "front", [0.03, 0.0100000001, 0.01])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"start": "curvature"}, "starts each point from its neighbour"),
        ({"budget_guarantee": {"prompts": 4}}, "a front has none"),
    ],
)
def test_a_front_refuses_other_methods_before_any_work(
    options: dict[str, Any], sentence: str, trio: Path, image_calibration: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(trio, image_calibration, inject_weight=None, **options)
    with pytest.raises(RecipeError, match=sentence):
        front(recipe, tmp_path / "factors", tmp_path / "front", [0.01])
    assert not (tmp_path / "front").exists()
