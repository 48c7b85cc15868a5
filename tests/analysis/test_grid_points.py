"""Grids are read as written, and the Pareto front is what it says."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import yaml
from hypothesis import given, strategies as st

from vlmgraft.analysis.grid_points import as_override, grid_points, pareto, parse_grid, parse_numbers
from vlmgraft.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("method.scale=0:2:0.5", [0, 0.5, 1, 1.5, 2]),
        ("method.scale=0:1:0.3", [0, 0.3, 0.6, 0.9]),
        ("a=1:-1:-1", [1, 0, -1]),
        ("a=2:2:1", [2]),
        ("a=0.1:0.3:0.1", [0.1, 0.2, 0.3]),
        ("method.rule=star, iso", ["star", "iso"]),
        ("method.rank={energy: 0.9},8,full", [{"energy": 0.9}, 8, "full"]),
        ("a=true,null,1e-3", [True, None, "1e-3"]),
    ],
)
def test_values(text: str, values: list[object]) -> None:
    assert parse_grid(text) == (text.partition("=")[0], values)


@given(st.floats(-100, 100), st.integers(1, 50), st.floats(0.001, 10).map(lambda step: float(f"{step:.3g}")))
def test_ranges_keep_their_steps_and_their_end(start: float, count: int, step: float) -> None:
    start = float(f"{start:.4g}")
    values = parse_grid(f"a={start!r}:{start + count * step!r}:{step!r}")[1]
    assert len(values) in (count + 1, count)  # the end may be missed by rounding of its own text
    assert values[0] == pytest.approx(start)
    assert all(math.isclose(b - a, step, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairwise(values))


@pytest.mark.parametrize("text", ["a", "=1", "a=", "a=0:1:0", "a=0:1:-1", "a=0:1:1e-9", "a=[", "a=1:2:--3"])
def test_what_is_no_grid(text: str) -> None:
    with pytest.raises(RecipeError, match="--grid"):
        parse_grid(text)


def test_points_are_all_combinations_in_order() -> None:
    assert grid_points([]) == [{}]
    points = grid_points(["a=1,2", "b=x,y"])
    assert points == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
    with pytest.raises(RecipeError, match="given twice"):
        grid_points(["a=1", "a=2"])
    with pytest.raises(RecipeError, match="more than 1000"):
        grid_points(["a=0:99:1", "b=0:99:1"])


@pytest.mark.parametrize("value", [1, 0.25, "star", {"energy": 0.9}, [1, 2], True, None, "0-3"])
def test_an_override_carries_the_value(value: object) -> None:
    key, _, text = as_override("method.x", value).partition("=")
    assert key == "method.x" and yaml.safe_load(text) == value


POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    front = pareto(points)
    assert any(front)
    best = max(points)
    assert front[points.index(best)]
    for point, on in zip(points, front, strict=True):
        beaten = [o for o in points if o != point and o[0] >= point[0] and o[1] >= point[1]]
        assert on == (not beaten)
    kept = [point for point, on in zip(points, front, strict=True) if on]
    assert all(pareto(kept))


def test_numbers_of_an_option() -> None:
    assert parse_numbers("budgets", "0.01,3") == [0.01, 3.0] and parse_numbers("scale", "0:1:0.5") == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("text", ["much", "0.01:0.02", "1,true", "[1]"])
def test_what_is_no_number_is_refused_by_the_options_name(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--budgets .*numbers"):
        parse_numbers("budgets", text)
