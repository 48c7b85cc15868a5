"""Numbers over depth and by group, and what is refused before a merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_merge import Counted, Fake, models

from vlmgraft.errors import AlignmentError, RecipeError
from vlmgraft.methods import METHODS
from vlmgraft.methods.base import TensorContext, check_numbers, check_range, number_for
from vlmgraft.methods.linear import Linear
from vlmgraft.methods.task_arithmetic import TaskArithmetic


@pytest.mark.parametrize(("layer", "expected"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 3.0), (4, 5.0)])
def test_a_list_is_interpolated_over_depth(layer: int, expected: float) -> None:
    assert number_for([0.0, 1.0, 5.0], TensorContext("n", (), 5, layer), "scale") == pytest.approx(expected)


def test_a_number_and_a_map() -> None:
    context = TensorContext("n", (), 5, 3, "mlp")
    assert number_for(0.5, context, "scale") == 0.5
    assert number_for({"mlp": 0.25, "attention": 1.0}, context, "scale") == 0.25


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"attention": 1.0}, "no value for group 'mlp'"),
        ({"attention": 1.0, "mlp": 1.0, "atention": 1.0}, "did you mean 'attention'"),
        ([], "empty"),
    ],
)
def test_a_number_that_does_not_hold_everywhere_is_found_before_a_merge(value: Any, message: str) -> None:
    alignment = Fake(models()).alignment
    with pytest.raises(RecipeError, match=message):
        check_numbers(TaskArithmetic(value), alignment)
    check_numbers(TaskArithmetic({"attention": 1.0, "mlp": 0.0}), alignment)


def test_a_list_needs_layers() -> None:
    alignment = Fake(models(shapes={"model.norm.weight": (7,)})).alignment
    check_numbers(Linear(0.5), alignment)
    with pytest.raises(RecipeError, match=r"model\.norm\.weight is in no layer"):
        check_numbers(Linear([0.5, 1.0]), alignment)


def test_matrix_methods_are_not_given_vectors() -> None:
    class Matrices(TaskArithmetic):
        matrices_only = True

    check_numbers(Matrices(), Fake(models()).alignment)
    with pytest.raises(AlignmentError, match=r"shape \(7,\) is not a matrix"):
        check_numbers(Matrices(), Fake(models(shapes={"model.norm.weight": (7,)})).alignment)


@pytest.mark.parametrize("value", [2.0, [0.5, 2.0], {"mlp": -1.0}, 0.0])
def test_ranges(value: Any) -> None:
    with pytest.raises(RecipeError, match="above 0 and at most 1"):
        check_range(TaskArithmetic(value), "scale", low=0, high=1, above=True)
    check_range(TaskArithmetic([0.5, 1.0]), "scale", low=0, high=1, above=True)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"frism", "curvature"}))
def test_tensors_may_lie_transposed_in_memory(name: str) -> None:
    """Sources that are put together from other layouts are views; every method treats them as what they are."""
    method: Any = METHODS[name](**{"frank": {"decay": 0.1}, "layer_swap": {"keep_layers": 1}}.get(name, {}))
    fake = Fake(models(), 10**6)
    method = method.prepare(fake)
    for tensor in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.down_proj"):
        whole = {key: model[tensor] for key, model in fake.models.items()}
        turned = {key: one.mT.contiguous().mT for key, one in whole.items()}
        context = fake.context(tensor)
        torch.testing.assert_close(method.apply(turned, context), method.apply(whole, context))
        assert all(turned[key].equal(whole[key]) for key in whole)


@pytest.mark.parametrize(("name", "options"), [("frank", {"decay": 0.1}), ("dare_ties", {})])
def test_a_method_makes_the_passes_that_it_announces(name: str, options: dict[str, Any]) -> None:
    method: Any = METHODS[name](**options)
    passes = Counted(Fake(models()))
    method.prepare(passes)
    assert passes.begun == method.passes
