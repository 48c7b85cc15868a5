"""Coverage of certified scalings on the lab: many calibration draws, the KL of all other prompts."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

from vlmgraft.alignment import align
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.risk_control import betting_bound, certify, conformal_bound
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.lab import world
from vlmgraft.lab.exam import draw_exam
from vlmgraft.spectral.decompose import decompose
from vlmgraft.spectral.gates import Gates, constant_gates

POOL, DRAWS, PROMPTS, LEVEL = 800, 300, 100, 0.9
PATH = tuple(step / 10 for step in range(1, 11))


@pytest.fixture(scope="module")
def divergences(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, np.ndarray]:
    """t → KL of every prompt of the pool, with the donor's whole task vector scaled by t."""
    vlm, donor, base = (open_checkpoint(trio / name) for name in ("vlm", "donor", "base"))
    store = decompose(align(vlm, donor, base), tmp_path_factory.mktemp("coverage") / "factors", 32)
    questions = draw_exam(7, "calibration", dict.fromkeys(world.PERCEPTION, POOL // len(world.PERCEPTION))).questions
    model = load_vlm(trio / "vlm", torch.float32, torch.device("cpu"))
    distiller = Distiller(model, load_processor(trio / "vlm"), store, questions, max_new_tokens=8)
    gates = constant_gates({name: tuple(store[name].s.shape) for name in store}, math.inf, 0.5)
    found = {}
    for t in PATH:
        with distiller.applied(Gates(gates.logits, gates.scale * t)) as scaled:
            found[t] = distiller.targets.prompt_kl(scaled).numpy()
    return found


@pytest.mark.slow
def test_the_kl_of_other_prompts_is_within_the_budget_as_often_as_promised(
    divergences: dict[float, np.ndarray],
) -> None:
    """The budget is the pool's KL at t = 0.6, capped at ten budgets; every draw certifies on 100 prompts of 800."""
    budget = float(divergences[0.6].mean())
    cap, rng = 10 * budget, np.random.default_rng(0)
    true = {t: values.clip(0, cap) for t, values in divergences.items()} | {0.0: np.zeros(len(divergences[1.0]))}
    exceeded, conformal, scalings = 0, [], []
    for _ in range(DRAWS):
        chosen = rng.permutation(len(divergences[1.0]))
        mine, others = chosen[:PROMPTS], chosen[PROMPTS:]
        measure = {t: values[mine] for t, values in divergences.items()}.__getitem__
        sure = certify(measure, PATH, budget, cap, partial(betting_bound, level=LEVEL)).t
        mean = certify(measure, PATH, budget, cap, conformal_bound).t
        exceeded += true[sure][others].mean() > budget
        conformal.append(true[mean][others].mean())
        scalings.append(sure)
    print(
        f"budget {budget:.4g}; above it {exceeded} of {DRAWS}; mean t {np.mean(scalings):.3f}; "
        f"conformal mean {np.mean(conformal):.4g}; clipped at t = 1 {(divergences[1.0] >= cap).mean():.3f}"
    )
    assert exceeded <= binom.ppf(0.999, DRAWS, 1 - LEVEL)
    assert np.mean(conformal) <= budget * 1.02 and np.mean(scalings) > 0.3
