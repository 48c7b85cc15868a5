"""Gates for the points of a sweep: truncated factors, trainings that share what they may, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_tools import bits, same_bits

from vlmgraft.alignment import Alignment
from vlmgraft.analysis import gate_learner
from vlmgraft.analysis.gate_learner import GateLearner, truncated
from vlmgraft.errors import RecipeError
from vlmgraft.lab.exam import draw_exam, save_questions
from vlmgraft.methods.calibration import BATCHES
from vlmgraft.recipe.model import Recipe, load_recipe
from vlmgraft.recipe.resolve import Questions, read_questions
from vlmgraft.spectral.factors import Factors, factorize


@pytest.mark.parametrize("rank", ["full", 3, {"energy": 0.8}])
def test_truncated_factors_are_those_of_a_truncated_decomposition(rank: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 6), (3, 8, 6)):
        tau = torch.randn(shape, generator=generator) * torch.logspace(0, -1, 6)
        mine, theirs = truncated(factorize(tau, "t", "t"), rank), factorize(tau, "t", "t", rank)
        assert mine.s.shape == theirs.s.shape
        torch.testing.assert_close(mine.update(), theirs.update(), rtol=1e-3, atol=1e-4)


@pytest.fixture
def recipe(trio: Path, tmp_path: Path) -> Any:
    save_questions(draw_exam(0, "calibration", {"read": 4}).questions, tmp_path / "c.jsonl")
    save_questions(draw_exam(0, "calibration", {"sum": 2}, as_image=False).questions, tmp_path / "q.jsonl")
    calibration = {"data": str(tmp_path / "c.jsonl"), "samples": 3, "held_out": 1, "max_new_tokens": 4}

    def make(name: str, **options: Any) -> Recipe:
        models = {
            key: str(trio / folder) for key, folder in (("vlm", "vlm"), ("donor", "donor"), ("donor_base", "base"))
        }
        return load_recipe({**models, "method": {"name": name, "calibration": calibration, **options}})

    return make


def gates_of(learner: GateLearner, asked: Recipe, alignment: Alignment, factors: dict[str, Factors]) -> Any:
    return learner.gates_of(asked, read_questions(asked), alignment, factors)


def test_trainings_share_the_teacher_and_leave_the_model_as_it_was(
    vlm_model: Any, processor: Any, alignment: Alignment, factors: dict[str, Factors], recipe: Any, tmp_path: Path
) -> None:
    before, learner = bits(vlm_model), GateLearner(vlm_model, processor)
    energy = {"steps": 1, "inject_weight": 0.1}
    donor = {"steps": 1, "inject": "donor", "questions": str(tmp_path / "q.jsonl"), "inject_weight": 1.0}
    learned, full = gates_of(learner, recipe("frism", **energy), alignment, factors)
    assert learned.settings["inject"] == "energy" and full.keys() == factors.keys()
    shared = dict(learner._distillers)
    matched, _ = gates_of(learner, recipe("frism", **donor), alignment, factors)
    assert matched.settings["inject"] == "donor" and learner._distillers == shared
    assert learned.logits.keys() == matched.logits.keys() == factors.keys()
    name = next(iter(factors))
    assert not learned.logits[name].equal(matched.logits[name])
    hard, cut = gates_of(learner, recipe("curvature", rank=2, kl_budget=0.001), alignment, factors)
    assert len(learner._distillers) == 2 and {matrix.s.shape[-1] for matrix in cut.values()} == {2}
    assert all(bool((gates.sigmoid().round() - gates.sigmoid()).abs().max() < 1e-6) for gates in hard.logits.values())
    assert same_bits(vlm_model, before)


def test_questions_are_read_and_steps_taken_as_the_recipe_says(
    alignment: Alignment, factors: dict[str, Factors], recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same fields reach the distiller and the training as where `gates` learns from the recipe."""
    seen: dict[str, Any] = {}

    class Recorder:
        def __init__(self, *models: Any, **options: Any) -> None:
            seen.update(options)
            self.factors = models[2]

        def learn(self, scale: float, **options: Any) -> str:
            seen.update(options)
            return "gates"

    monkeypatch.setattr(gate_learner, "Distiller", Recorder)
    asked = recipe("frism", steps=3, batches_per_step=2, gradient_checkpointing=True, seed=5)
    assert gates_of(GateLearner(None, None), asked, alignment, factors)[0] == "gates"
    method = asked.method
    for name in ("max_new_tokens", *BATCHES, "packing", "tokens"):
        assert seen[name] == getattr(method.calibration, name)
    for name in ("inject", "kl_budget", "steps", "learning_rate", "batches_per_step", "seed", "granularity"):
        assert seen[name] == getattr(method, name)
    assert seen["gradient_checkpointing"] is True and seen["start"] == 0.0


def test_several_donors_are_refused(
    vlm_model: Any, processor: Any, alignment: Alignment, factors: dict[str, Factors], recipe: Any
) -> None:
    two = recipe("frism")
    two = two.model_copy(update={"more_donors": (object(),)})
    with pytest.raises(RecipeError, match="sweep the donors one by one"):
        GateLearner(vlm_model, processor).gates_of(two, Questions([], [], [], []), alignment, factors)
