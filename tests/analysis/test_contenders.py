"""Which rules fit, what recipe each strength is, and where the KL meets the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlmgraft.alignment import Alignment
from vlmgraft.analysis.contenders import RULES, Contenders, fitting
from vlmgraft.analysis.in_memory import Rebuilder
from vlmgraft.errors import RecipeError
from vlmgraft.recipe.model import Recipe, load_recipe

Q = "layers.0.self_attn.q_proj.weight"


def recipe(trio: Path, **more: Any) -> Recipe:
    models = {key: str(trio / folder) for key, folder in (("vlm", "vlm"), ("donor", "donor"), ("donor_base", "base"))}
    return load_recipe({**models, "modules": ["attention", "mlp"], **more}, need_method="method" in more)


def test_a_rule_fits_where_its_checkpoints_are_named(trio: Path) -> None:
    alone = recipe(trio)
    assert fitting(alone) == [name for name, rule in RULES.items() if "vlm_base" not in rule.needs]
    both = recipe(trio, vlm_base=str(trio / "base"))
    assert fitting(both) == list(RULES) and fitting(both, ["sce", "linear"]) == ["linear", "sce"]
    learned = recipe(trio, method={"name": "frism", "calibration": {"data": "c.jsonl"}})
    assert fitting(learned)[-1] == "frism"
    with pytest.raises(RecipeError, match="ties needs vlm_base"):
        fitting(alone, ["ties"])
    with pytest.raises(RecipeError, match="'frank' is none of"):
        fitting(both, ["frank"])


@pytest.mark.parametrize("name", RULES)
def test_every_strength_is_a_recipe_that_loads(name: str, trio: Path, alignment: Alignment, tmp_path: Path) -> None:
    with Rebuilder(alignment) as rebuilder:
        contenders = Contenders(recipe(trio, vlm_base=str(trio / "base")), alignment, rebuilder, 0.01, tmp_path)
        half = contenders.recipe_at(name, contenders.limit(name) / 2)
    assert half.method is not None and half.modules == ("attention", "mlp")


def test_the_strength_is_where_the_kl_meets_the_budget(trio: Path, alignment: Alignment, tmp_path: Path) -> None:
    """A KL of ‖λτ‖² in one matrix: λ = √budget/‖τ‖ within the tolerance, from below."""
    with Rebuilder(alignment) as rebuilder:
        (tau,) = (rebuilder.weights(load_recipe({**plain(trio), "method": "task_arithmetic"}).method)[Q],)
        vlm = rebuilder._inputs.readers["vlm"].tensor(f"model.{Q}").float()

        def kl_of(weights: Any) -> float:
            return float((weights[Q] - vlm).double().square().sum()) if weights else 0.0

        contenders = Contenders(recipe(trio), alignment, rebuilder, 0.02, tmp_path)
        strength, kl = contenders.strength_within("task_arithmetic", kl_of)
        assert strength == pytest.approx((0.02**0.5) / float((tau - vlm).double().norm()), rel=0.02)
        assert 0.97 * 0.02 <= kl <= 0.02
        assert contenders.strength_within("task_arithmetic", lambda weights: 1.0) == (None, 1.0)
        strength, kl = contenders.strength_within("linear", lambda weights: 0.001)
        assert (strength, kl) == (1.0, 0.001)  # within the budget at every strength: the largest


def test_a_rule_without_strength_is_taken_or_left(trio: Path, alignment: Alignment, tmp_path: Path) -> None:
    class OneTensor(Rebuilder):
        def weights(self, method: Any) -> Any:
            return {Q: torch.zeros(1)}

    both = recipe(trio, vlm_base=str(trio / "base"))
    contenders = Contenders(both, alignment, OneTensor(alignment), 0.02, tmp_path)
    assert contenders.strength_within("sce", lambda weights: 0.0201) == (1.0, 0.0201)
    assert contenders.strength_within("sce", lambda weights: 0.03) == (None, 0.03)


def plain(trio: Path) -> dict[str, str]:
    return {key: str(trio / folder) for key, folder in (("vlm", "vlm"), ("donor", "donor"), ("donor_base", "base"))}
