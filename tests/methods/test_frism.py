"""The FRISM recipe and its fold."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from pydantic import TypeAdapter, ValidationError

from vlmgraft.errors import CheckpointError, RecipeError
from vlmgraft.methods.base import TensorContext
from vlmgraft.methods.calibration import Calibration
from vlmgraft.methods.curvature import Curvature
from vlmgraft.methods.frism import BudgetGuarantee, Frism, GatedFold, fold
from vlmgraft.spectral.factor_store import FactorStore
from vlmgraft.spectral.factors import Factors, factorize
from vlmgraft.spectral.gates import Gates, constant_gates

NAME = "model.layers.0.mlp.up_proj.weight"


def example(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, Factors]:
    generator = torch.Generator().manual_seed(seed)
    weight, tau = torch.randn(2, rows, columns, generator=generator)
    return weight, tau, factorize(tau, NAME, NAME.removeprefix("model."))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 2), st.integers(0, 9999))
def test_identities(rows: int, columns: int, scale: float, seed: int) -> None:
    """Logits 0: task arithmetic at λ/2; +inf: at λ; −inf, or λ = 0: the VLM bit for bit."""
    weight, tau, factors = example(rows, columns, seed)
    for logit, share in ((0.0, 0.5), (math.inf, 1.0), (-math.inf, 0.0)):
        gates = constant_gates({NAME: len(factors.s)}, logit, scale)
        merged = GatedFold({NAME: factors}, gates).matrix(NAME, weight)
        assert torch.allclose(merged, weight + scale * share * tau, atol=1e-4)
        if share * scale == 0:
            assert merged.equal(weight)


def test_a_merge_runs_it_on_whole_matrices() -> None:
    """Open gates at λ are task arithmetic; closed ones give back the very object."""
    weight, tau, factors = example(6, 4, 0)
    context, sources = TensorContext(NAME, (6, 4), layers=1, layer=0), {"vlm": weight}
    open_ = Frism(scale=0.5).bind({NAME: factors}, constant_gates({NAME: 4}, math.inf, 0.5))
    assert open_.whole_tensors and open_.needs == frozenset()
    assert torch.allclose(open_.apply(sources, context), weight + 0.5 * tau, atol=1e-5)
    closed = Frism().bind({NAME: factors}, constant_gates({NAME: 4}, -math.inf, 0.5))
    assert closed.apply(sources, context) is weight


def test_bfloat16_weights_stay_bit_identical_behind_closed_gates() -> None:
    weight, _, factors = example(6, 4, 0)
    low = weight.bfloat16()
    assert fold(low, factors, torch.zeros(4)).bfloat16().equal(low)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 9999))
def test_the_fold_is_the_sum_over_directions(rows: int, columns: int, seed: int) -> None:
    weight, _, factors = example(rows, columns, seed)
    logits = torch.randn(len(factors.s), generator=torch.Generator().manual_seed(seed))
    merged = GatedFold({NAME: factors}, Gates({NAME: logits}, 0.7)).matrix(NAME, weight)
    expected = weight.double()
    for i, gate in enumerate(logits.double().sigmoid()):
        expected += 0.7 * gate * factors.s[i].double() * torch.outer(factors.U[:, i], factors.Vh[i]).double()
    assert torch.allclose(merged.double(), expected, atol=1e-5)


def test_parts_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    weight, _, factors = example(6, 4, 0)
    with pytest.raises(CheckpointError, match="no factors"):
        GatedFold({}, constant_gates({NAME: 4}, 0, 1))
    whole = GatedFold({NAME: factors}, constant_gates({NAME: 4}, 0, 1))
    with pytest.raises(CheckpointError, match="has no gates"):
        whole.matrix("other", weight)
    with pytest.raises(CheckpointError, match=r"\(6, 4\) for a weight of \(4, 6\)"):
        whole.matrix(NAME, weight.mT)
    with pytest.raises(CheckpointError, match="3 gates for 4 directions"):
        GatedFold({NAME: factors}, constant_gates({NAME: 3}, 0, 1)).matrix(NAME, weight)

    store = FactorStore(tmp_path)
    store.save(replace(factors, name=NAME), "of the inputs")
    store.finish([NAME], {})
    with pytest.raises(CheckpointError, match=f"made for factors xyz, these are {store.digest}"):
        GatedFold(store, Gates({NAME: torch.zeros(4)}, 1.0, factors="xyz"))
    assert GatedFold(store, Gates({NAME: torch.zeros(4)}, 1.0)).task_vector_norm(NAME) == pytest.approx(
        float((factors.U * factors.s @ factors.Vh).norm()), rel=1e-5
    )


def test_the_recipe_validates_strictly() -> None:
    adapter = TypeAdapter(Frism)
    found = adapter.validate_python({"scale": 0.5, "rank": {"energy": 0.9}, "calibration": {"data": "q.jsonl"}})
    assert found.scale == 0.5 and found.calibration.samples == 512
    assert adapter.validate_python({"rank": 256}).rank == 256
    with pytest.raises(ValidationError):
        adapter.validate_python({"inject": "energi"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inject_weight": 1.0, "kl_budget": 0.1}, "exclude each other"),
        ({"kl_budget": 0.0}, "kl_budget"),
        ({"inject": "donor"}, "method.questions"),
        ({"kl_budget": 0.1, "calibration": Calibration("c.jsonl", held_out=0)}, "set method.calibration.held_out"),
        ({"start": "curvature"}, "method.start"),
        ({"budget_guarantee": BudgetGuarantee()}, "budget_guarantee"),
        ({"steps": -1}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"batches_per_step": 0}, "batches_per_step"),
        ({"donor_tokens": 0}, "donor_tokens"),
        ({"rank": 0}, "rank"),
        ({"rank": {"energy": 2.0}}, "rank"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Frism(**options)


def test_the_least_that_an_option_may_be_is_taken() -> None:
    least = Frism(steps=0, batches_per_step=1, donor_tokens=1, calibration=Calibration("c.jsonl", held_out=0))
    assert Frism().rank == Curvature().rank == 128, "docs/measured.md says why"
    assert least.donor_length == 1 and Frism().donor_length == Calibration("c.jsonl").max_new_tokens == 64
    assert Calibration("c.jsonl", 1, 0, 1, 1, 1, 1, 1).samples == BudgetGuarantee(prompts=1).prompts == 1


@pytest.mark.parametrize(
    "make",
    [
        *(
            partial(BudgetGuarantee, **{name: value})
            for name, value in (("level", 0.0), ("level", 1.0), ("prompts", 0))
        ),
        *(partial(BudgetGuarantee, cap=cap) for cap in (0.0, math.inf)),
        *(partial(Calibration, "c.jsonl", **{name: 0}) for name in ("samples", "max_new_tokens", "batch_tokens")),
        partial(Calibration, "c.jsonl", held_out=-1),
    ],
)
def test_less_is_refused(make: Any) -> None:
    with pytest.raises(RecipeError, match=rf"\.{next(iter(make.keywords))}: .* must"):
        make()


def test_a_fold_is_named_by_what_it_holds_not_by_where_it_lies() -> None:
    def fold_of(logit: float) -> GatedFold:
        return GatedFold({"w": factorize(torch.eye(3), "w", "w")}, constant_gates({"w": 3}, logit, scale=1.0))

    assert repr(fold_of(0.5)) == repr(fold_of(0.5)) != repr(fold_of(0.6))
    assert "cpu" not in repr(fold_of(0.5)) and repr(replace(fold_of(0.5), device="cuda")).endswith(", cuda)")
