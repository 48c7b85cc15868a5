"""DARE: what is dropped depends on nothing but seed, tensor and entry; what is left is the formula, and PEFT's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_merge import Fake, context_of, models, run
from hypothesis import given, settings, strategies as st
from peft.utils import merge_utils
from pydantic import TypeAdapter

from vlmgraft.errors import RecipeError
from vlmgraft.methods import METHODS
from vlmgraft.methods.dare import DareLinear, DareTies, drop, keep_mask
from vlmgraft.methods.draws import BLOCK
from vlmgraft.methods.ties import Ties

NAME = "model.layers.0.mlp.up_proj.weight"
LONG = context_of(NAME, (3, BLOCK))
WHOLE = keep_mask(7, "donor", LONG, 3 * BLOCK, 0.3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3 * BLOCK - 1), st.integers(1, 2 * BLOCK))
def test_a_mask_does_not_depend_on_the_chunk(start: int, count: int) -> None:
    count = min(count, 3 * BLOCK - start)
    assert keep_mask(7, "donor", replace(LONG, start=start), count, 0.3).equal(WHOLE[start : start + count])


def test_a_mask_depends_on_seed_source_tensor_and_block() -> None:
    others = [
        keep_mask(8, "donor", LONG, BLOCK, 0.3),
        keep_mask(7, "vlm", LONG, BLOCK, 0.3),
        keep_mask(7, "donor", replace(LONG, name="other"), BLOCK, 0.3),
        WHOLE[BLOCK : 2 * BLOCK],
    ]
    for other in others:  # independent masks agree on 0.3² + 0.7² of the entries
        assert (other == WHOLE[:BLOCK]).float().mean().item() == pytest.approx(0.58, abs=0.01)
    assert WHOLE.float().mean().item() == pytest.approx(0.3, abs=0.005)


def test_a_mask_stays_the_same_from_release_to_release() -> None:
    """A recipe with its seed replays a merge: these bits are part of the format."""
    assert "".join(str(int(bit)) for bit in keep_mask(0, "donor", LONG, 32, 0.5)) == "01011111101111110001001100011010"


def test_rescaling_keeps_the_expectation() -> None:
    mean = drop(torch.ones(3 * BLOCK), 0, "vlm", LONG, 0.25, rescale=True).mean().item()
    assert mean == pytest.approx(1, abs=0.02)
    assert set(drop(torch.ones(64), 0, "vlm", LONG, 0.25, rescale=True).tolist()) == {0.0, 4.0}
    assert set(drop(torch.ones(64), 0, "vlm", LONG, 0.25, rescale=False).tolist()) == {0.0, 1.0}


def dropped(fake: Fake, name: str, density: float, divide: bool) -> list[torch.Tensor]:
    """Both task vectors, dropped, over whole tensors."""
    found = []
    for key in ("vlm", "donor"):
        tau = fake.tau(key)[name]
        kept = keep_mask(3, key, fake.context(name), tau.numel(), density).reshape(tau.shape)
        found.append(torch.where(kept, tau / density if divide else tau, 0.0))
    return found


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("chunk", [5, 10**6])
def test_what_is_left_is_merged_as_peft_does(rescale: bool, chunk: int) -> None:
    fake, weights = Fake(models(low=False), chunk), torch.tensor([1.6, 0.4])
    linear = run(DareLinear(0.5, (1.6, 0.4), 0.7, rescale, seed=3), fake)
    ties = run(DareTies(0.5, (1.6, 0.4), 0.7, rescale, seed=3), fake)
    for name, base in fake.models["vlm_base"].items():
        left = dropped(fake, name, 0.5, rescale)
        torch.testing.assert_close(linear[name], base + 0.7 * merge_utils.task_arithmetic(left, weights))
        stacked = torch.stack(left)
        mask = merge_utils.calculate_majority_sign_mask(stacked)
        weighted = stacked * merge_utils.reshape_weight_task_tensors(stacked, weights)
        torch.testing.assert_close(ties[name], base + 0.7 * merge_utils.disjoint_merge(weighted, mask))


@pytest.mark.parametrize("election", ["unweighted", "weighted"])
@pytest.mark.parametrize("combine", ["mean", "weighted_mean", "sum"])
def test_nothing_dropped_is_ties_with_nothing_trimmed(election: Any, combine: Any) -> None:
    fake = Fake(models())
    expected = run(Ties(1.0, (0.5, 2.0), 0.7, "global", election=election, combine=combine), fake)
    found = run(DareTies(1.0, (0.5, 2.0), 0.7, election=election, combine=combine), fake)
    assert all(found[name].equal(expected[name]) for name in fake.names)


@pytest.mark.parametrize("method", [DareLinear, DareTies])
def test_identities(method: Any) -> None:
    """Without the donor's task vector and nothing dropped: the VLM; at scale zero: its base; twice: the same."""
    found = models()
    for name, merged in run(method(1.0), Fake({**found, "donor": found["donor_base"]})).items():
        torch.testing.assert_close(merged, found["vlm"][name], atol=1e-6, rtol=0)
    for name, merged in run(method(scale=0.0), Fake(found)).items():
        assert merged.equal(found["vlm_base"][name])
    once, again = run(method(), Fake(found, 3)), run(method(), Fake(found, 64))
    assert all(once[name].equal(again[name]) for name in once)
    assert any(not once[name].equal(one) for name, one in run(method(seed=1), Fake(found)).items())


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": {"mlp": 2.0}}, {"scale": float("inf")}])
@pytest.mark.parametrize("method", [DareLinear, DareTies])
def test_options_that_cannot_be_meant_are_refused(method: Any, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        method(**options)


def test_the_recipes_validate() -> None:
    for name in ("dare_linear", "dare_ties"):
        found: Any = TypeAdapter(METHODS[name]).validate_python({"weights": [1.0, 0.5], "rescale": False})
        assert found.weights == (1.0, 0.5) and not found.rescale
