"""A budget with a guarantee: KL per prompt, gates scaled to a bound, and where the bound is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import vlmgraft as vg
from vlmgraft.distillation import targets as targets_module
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.guarantee import check_guarantee
from vlmgraft.distillation.risk_control import SCALINGS, conformal_bound
from vlmgraft.errors import DataError, RecipeError
from vlmgraft.methods.frism import BudgetGuarantee, Frism
from vlmgraft.recipe.model import load_recipe
from vlmgraft.recipe.resolve import read_questions
from vlmgraft.spectral.factors import Factors
from vlmgraft.spectral.gate_store import load_gates
from vlmgraft.spectral.gates import Gates, constant_gates


@pytest.fixture
def open_gates(factors: dict[str, Factors]) -> Gates:
    return constant_gates({name: len(f.s) for name, f in factors.items()}, math.inf, 0.8)


def test_kl_per_prompt_is_the_mean_over_its_tokens(distiller: Distiller, open_gates: Gates) -> None:
    """Against a loop over rows of the batches; weighted by their tokens, prompts give the KL per token."""
    targets = distiller.held_out_targets
    assert targets is not None
    means, counts = [], []
    with distiller.applied(open_gates) as model, torch.no_grad():
        found = targets.prompt_kl(model)
        for batch in targets.batches:
            kl = batch.kl(model).tolist()
            for row in batch.predicts.sum(1).tolist():
                counts.append(row)
                means.append(sum(kl[:row]) / row)
                del kl[:row]
    assert found.tolist() == pytest.approx(means, rel=1e-6) and len(means) == targets.questions == 12
    weighted = sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)
    assert weighted == pytest.approx(distiller.keep_kl(open_gates), rel=1e-6)


@pytest.mark.filterwarnings("ignore:kl_budget is measured")
@pytest.mark.parametrize("rows", [512, 5])
def test_of_cut_distributions_the_certified_kl_is_that_of_the_whole_vocabulary(
    distiller: Distiller, open_gates: Gates, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """A bound on lower bounds would certify nothing. Against targets kept whole; also in pieces of the head."""
    options = {"max_new_tokens": 4, "batch_size": 4}
    whole = Distiller(distiller.model, distiller.processor, distiller.factors, distiller.questions[:8], **options)
    monkeypatch.setattr(targets_module, "FULL_VOCABULARY", 8)
    monkeypatch.setattr(targets_module, "HEAD_ROWS", rows)
    monkeypatch.setattr(targets_module.Distribution.of.__func__, "__defaults__", (8,))
    cut = Distiller(distiller.model, distiller.processor, distiller.factors, distiller.questions[:8], **options)
    assert whole.targets.whole and not cut.targets.whole
    measured: list[Any] = []

    def bound(divergences: Any, cap: float) -> float:
        measured.append(divergences)
        return 0.0

    cut.certify(open_gates, cut.targets, 9.0, 9.0, bound)
    with whole.applied(open_gates) as model:
        wanted, lower = whole.targets.prompt_kl(model), cut.targets.prompt_kl(model)
    assert measured[-1].tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    assert bool((lower.numpy() < measured[-1]).all())


def test_gates_are_scaled_to_the_last_bound_within_the_budget(distiller: Distiller, open_gates: Gates) -> None:
    targets, cap = distiller.held_out_targets, 0.05
    assert targets is not None

    def bound_at(t: float) -> float:
        with distiller.applied(Gates(open_gates.logits, 0.8 * t)) as model:
            return conformal_bound(targets.prompt_kl(model).numpy(), cap)

    budget = (bound_at(SCALINGS[11]) + bound_at(SCALINGS[12])) / 2
    gates, certified = distiller.certify(open_gates, targets, budget, cap, conformal_bound)
    assert certified.t == SCALINGS[11] and gates.scale == pytest.approx(0.8 * certified.t)
    assert certified.bound == pytest.approx(bound_at(certified.t), rel=1e-5)
    assert all(gates.logits[name] is logits for name, logits in open_gates.logits.items())


def test_where_no_scaling_passes_the_gates_are_the_vlm(distiller: Distiller, open_gates: Gates) -> None:
    assert distiller.held_out_targets is not None
    gates, certified = distiller.certify(open_gates, distiller.held_out_targets, 1e-9, 1e-8, conformal_bound)
    assert (certified.t, certified.bound, gates.scale) == (0, 0, 0)
    assert distiller.keep_kl(gates) == distiller.keep_kl(None)


def recipe_of(trio: Path, data: Path, **guarantee: Any) -> dict[str, Any]:
    calibration = {"data": str(data), "samples": 12, "held_out": 4, "max_new_tokens": 4}
    method = {"name": "frism", "kl_budget": 0.05, "steps": 3, "calibration": calibration}
    roles = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    return {**roles, "method": {**method, "budget_guarantee": guarantee}}


def test_unseen_questions_are_the_next_ones(trio: Path, image_calibration: Path) -> None:
    lines = [json.loads(line)["question"] for line in image_calibration.read_text().splitlines()]
    parts = read_questions(load_recipe(recipe_of(trio, image_calibration, prompts=8)))
    asked = [[question.question for question in part] for part in (parts.learned, parts.held_out, parts.unseen)]
    assert asked == [lines[:12], lines[12:16], lines[16:]]
    with pytest.raises(DataError, match=r"has 8 questions behind the first 16, .*prompts is 200"):
        read_questions(load_recipe(recipe_of(trio, image_calibration, prompts=200)))


def test_what_cannot_be_shown_is_refused_before_any_work(trio: Path, image_calibration: Path, tmp_path: Path) -> None:
    """Eight prompts without any KL still leave c/9 on average: 0.0556 for a cap of 0.5, ten budgets."""
    said = r"8 prompts and a cap of 0.5 cannot show less than 0.0556 .*above kl_budget 0.05"
    with pytest.raises(RecipeError, match=said):
        vg.merge(recipe_of(trio, image_calibration, prompts=8, kind="expectation"), tmp_path / "merged")
    check_guarantee(load_recipe(recipe_of(trio, image_calibration, prompts=9, kind="expectation")).method)
    options: tuple[tuple[str, Any], ...] = (("level", 1.0), ("prompts", 0), ("cap", 0.0))
    for name, value in options:
        with pytest.raises(RecipeError, match=f"budget_guarantee.{name}"):
            BudgetGuarantee(**{name: value})
    with pytest.raises(RecipeError, match="kl_budget"):
        Frism(budget_guarantee=BudgetGuarantee())


def test_the_bound_is_in_gates_receipt_and_card(trio: Path, image_calibration: Path, tmp_path: Path) -> None:
    recipe = recipe_of(trio, image_calibration, kind="expectation", prompts=8, cap=0.2)
    with pytest.warns(UserWarning, match="held-out prompts"):
        receipt = vg.merge(recipe, tmp_path / "merged", workdir=tmp_path / "work")
    gates = load_gates(tmp_path / "work" / "gates")
    guarantee = gates.settings["guarantee"]
    assert 0 < guarantee["bound"] <= 0.05 and guarantee["t"] in SCALINGS and gates.scale == guarantee["t"]
    words = f"at most {guarantee['bound']:.3g} nats per token on average, before weights are rounded (8 prompts; "
    assert any(words in note for note in receipt.notes)
    assert words in (tmp_path / "merged" / "README.md").read_text()
