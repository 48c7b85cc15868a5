"""Grids over recipe fields in the command line's notation, and the Pareto front of measured points. Pure functions."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import yaml

from vlmgraft.errors import RecipeError
from vlmgraft.storage.yaml_text import parse_yaml

_RANGE = re.compile(r"([-+.\deE]+):([-+.\deE]+):([-+.\deE]+)")
MAX_POINTS = 1000


def parse_grid(text: str) -> tuple[str, list[Any]]:
    """The key and the values of `key=start:stop:step` (stop included) or `key=value,value,…` (YAML values).

    Raises:
        RecipeError: another form, steps that do not lead from start to stop, or more than 1,000 values.
    """
    key, equals, written = text.partition("=")
    if not equals or not key.strip() or not written.strip():
        raise RecipeError(f"--grid {text!r}: write key=start:stop:step or key=a,b,c, such as method.scale=0:2:0.25")
    span = _RANGE.fullmatch(written.strip())
    if span is None:
        try:
            values = parse_yaml(f"[{written}]")
        except ValueError:
            raise RecipeError(f"--grid {text!r}: {written!r} is no list of YAML values") from None
        return key.strip(), values
    try:
        start, stop, step = (float(number) for number in span.groups())
    except ValueError:
        raise RecipeError(f"--grid {text!r}: {written!r} is not start:stop:step in numbers") from None
    if step == 0 or (stop - start) / step < 0 or not all(map(math.isfinite, (start, stop, step))):
        raise RecipeError(f"--grid {text!r}: steps of {step:g} do not lead from {start:g} to {stop:g}")
    count = math.floor((stop - start) / step + 1e-9) + 1
    if count > MAX_POINTS:
        raise RecipeError(f"--grid {text!r}: {count} values; at most {MAX_POINTS}")
    return key.strip(), [_tidy(start + index * step) for index in range(count)]


def parse_numbers(option: str, text: str) -> list[float]:
    """The numbers of an option such as `--budgets 0.01,0.03` or `0:2:0.25`; raises RecipeError naming the option."""
    values = parse_grid(f"{option}={text}")[1]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise RecipeError(f"--{option} {text!r}: write numbers with commas between them, or start:stop:step")
    return [float(value) for value in values]


def _tidy(value: float) -> float:
    """Remove rounding noise (0.30000000000000004 → 0.3); whole numbers become int, for integer fields."""
    rounded = float(f"{value:.12g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def grid_points(grids: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of several grids as {key: value}, the last grid fastest; one empty point without grids.

    Raises:
        RecipeError: as `parse_grid`, a key twice, or more than 1,000 points.
    """
    parsed = [parse_grid(grid) for grid in grids]
    keys = [key for key, _ in parsed]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise RecipeError(f"--grid {twice}: given twice; write all its values in one")
    if math.prod(len(values) for _, values in parsed) > MAX_POINTS:
        raise RecipeError(f"--grid: more than {MAX_POINTS} points")
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(values for _, values in parsed))]


def as_override(key: str, value: Any) -> str:
    """A field of a point in the syntax of `--set`."""
    return f"{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}"


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are Pareto-optimal: none is at least as good in both numbers and better in one. Larger is better."""
    return [
        not any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)
        for point in points
    ]
