"""A KL budget that holds on unseen prompts: the recipe option `method.budget_guarantee`.

Gates are learned on the first questions of the calibration file, their budget is measured on the next, and the ones
after these are used for neither. The learned gates are scaled back until an upper bound on the mean KL of such unseen
prompts is within the budget; `risk_control` has the bounds. The file should be in random order: a bound holds for
prompts that are exchangeable with the last ones of the file.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmgraft.distillation.risk_control import bound_of
from vlmgraft.distillation.targets import Targets
from vlmgraft.errors import RecipeError
from vlmgraft.methods.frism import Frism
from vlmgraft.spectral.gates import Gates

if TYPE_CHECKING:
    from vlmgraft.distillation.distill import Distiller

CAP_IN_BUDGETS = 10.0
"""Default cap, in multiples of the budget, for recipes without one."""


def check_guarantee(method: Frism) -> None:
    """Raise RecipeError if so few prompts could not show a KL within the budget even if each of them had a KL of 0."""
    guarantee, budget = method.budget_guarantee, method.kl_budget
    if guarantee is None or budget is None:
        return
    cap = guarantee.cap or CAP_IN_BUDGETS * budget
    least = bound_of(guarantee.kind, guarantee.level)(np.zeros(guarantee.prompts), cap)
    if least > budget:
        raise RecipeError(
            f"method.budget_guarantee: {guarantee.prompts} prompts and a cap of {cap:g} cannot show less than "
            f"{least:.3g} nats per token, above kl_budget {budget:g}; raise prompts or lower cap"
        )


def within_budget(method: Frism, distiller: Distiller, learned: Gates, prompts: Targets) -> Gates:
    """The gates, scaled until the bound on unseen prompts is within the budget, with the bound in their settings."""
    guarantee, budget = method.budget_guarantee, method.kl_budget
    assert guarantee is not None and budget is not None
    cap = guarantee.cap or CAP_IN_BUDGETS * budget
    gates, certified = distiller.certify(learned, prompts, budget, cap, bound_of(guarantee.kind, guarantee.level))
    if certified.t == 0:
        warnings.warn(
            f"method.budget_guarantee: no scaling of the gates has a bound within {budget:g} nats per token; they are "
            "closed, and the result is the VLM. Raise budget_guarantee.prompts or kl_budget",
            stacklevel=2,
        )
    how = "on average" if guarantee.kind == "expectation" else f"with confidence {guarantee.level:g}"
    words = (
        f"mean KL of unseen prompts of the kind of {Path(method.calibration.data).name}: at most "
        f"{certified.bound:.3g} nats per token {how}, before weights are rounded ({prompts.questions} prompts; a KL "
        f"counts up to {cap:g}, which {certified.clipped:.1%} reach; gates scaled by {certified.t:g})"
    )
    described = {**asdict(guarantee), **asdict(certified), "cap": cap, "words": words}
    return replace(gates, settings={**gates.settings, "guarantee": described})
