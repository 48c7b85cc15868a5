"""Refuses unknown keys of a mapping against a dataclass or a list of names, with the nearest valid key."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vlmgraft.errors import RecipeError


def nearest(word: str, valid: Iterable[str]) -> str:
    """ "; did you mean 'scale'?" for the closest of `valid`, or nothing when none is close."""
    close = difflib.get_close_matches(word.lower(), list(valid), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse_unknown(
    given: Mapping[str, Any], valid: type | Collection[str], prefix: str, inner: Collection[str] = ()
) -> None:
    """Refuse keys of `given` that `valid` (a dataclass, entered recursively, or names) does not have.

    Args:
        prefix: the path in front of the keys, such as "method.".
        inner: keys that exist one level down, under `method`.
    Raises:
        RecipeError: naming the key's path, and the nearest valid key or the place where it belongs.
    """
    names = [field.name for field in dataclasses.fields(valid)] if isinstance(valid, type) else list(valid)
    for key in given:
        if key in names:
            continue
        if key in inner:
            raise RecipeError(f"{prefix}{key}: belongs under method; write `method: {{name: …, {key}: {given[key]}}}`")
        raise RecipeError(f"{prefix}{key}: unknown key{nearest(str(key), names) or ';'} Valid keys: {', '.join(names)}")
    if isinstance(valid, type):
        for name, cls in nested(valid).items():
            if isinstance(given.get(name), Mapping):
                refuse_unknown(given[name], cls, f"{prefix}{name}.")


def several_donors(raw: dict[str, Any]) -> None:
    """Lists under `donor` and `donor_base` become the first of each and `more_donors`; one base may serve all donors.

    Raises:
        RecipeError: an empty list, lists of different lengths, or lists beside `more_donors`.
    """
    donors, bases = raw.get("donor"), raw.get("donor_base")
    if not isinstance(donors, list):
        if isinstance(bases, list):
            raise RecipeError(f"donor_base: a list of {len(bases)} for one donor; write one model")
        return
    bases = bases if isinstance(bases, list) else [bases] * len(donors)
    if not donors or len(bases) != len(donors):
        raise RecipeError(
            f"donor_base: {len(bases)} models for {len(donors)} donors; give one for each, or one for all"
        )
    if raw.get("more_donors"):
        raise RecipeError("more_donors: write further donors here, or lists under donor and donor_base, not both")
    raw["donor"], raw["donor_base"] = donors[0], bases[0]
    if len(donors) > 1:
        raw["more_donors"] = [
            {"donor": one, "donor_base": base} for one, base in zip(donors[1:], bases[1:], strict=True)
        ]


def nested(cls: type) -> dict[str, type]:
    """Fields of a dataclass that hold another dataclass (also as one side of a union)."""
    hints = typing.get_type_hints(cls)
    found: dict[str, type] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        for option in (hint, *typing.get_args(hint)):
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                found[field.name] = option
    return found
