"""Shared by the recipes of merging and fine-tuning: safe YAML, keys set from the command line, and errors that name the
file, the key and the remedy.

A recipe that would grow or nest without bound is refused while it is parsed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vlmgraft.checkpoint.files import open_regular
from vlmgraft.errors import CheckpointError, RecipeError
from vlmgraft.storage.limits import MAX_RECIPE
from vlmgraft.storage.yaml_text import parse_yaml


class Strict(BaseModel):
    """A part of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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


PATHS = {
    "vlm", "donor", "donor_base", "vlm_base", "data", "questions", "train", "validation", "gates", "factors",
}  # fmt: skip
"""Keys of recipes, at any level, whose text may be a path."""


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Prefix the errors of the block with the recipe's file, unless they name it already."""
    try:
        yield
    except (RecipeError, CheckpointError) as error:
        if isinstance(source, Mapping) or str(source) in str(error):
            raise
        raise type(error)(f"{source}: {error}") from None


def folder_of(source: object) -> Path:
    """The folder of a recipe file; the working directory for a mapping."""
    return Path(source).parent if isinstance(source, str | Path) else Path()


def read_mapping(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The raw mapping of a recipe file or a mapping (copied)."""
    if isinstance(source, Mapping):
        return _plain(source)
    path = Path(source)
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_RECIPE + 1)
    except CheckpointError as error:
        raise RecipeError(f"{error}; give a recipe in YAML") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give a recipe in YAML") from None
    if len(raw) > MAX_RECIPE:
        raise RecipeError(f"{path}: has more than {MAX_RECIPE:,} bytes; a recipe is a page of YAML")
    try:
        value = parse_yaml(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 ({error.reason}); give a recipe in YAML") from None
    except ValueError as error:
        raise RecipeError(f"{path}: {error}; give a recipe in YAML") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise RecipeError(f"{path}: this is {kind}; a recipe is a mapping (vlm: …, donor: …, method: …)")
    return value


def refuse_odd_values(raw: Any, value: Any, prefix: str = "") -> None:
    """Raise RecipeError if a number is infinite or NaN, or if true or false was taken for a number.

    raw: the value as written. value: the value as validated, a mapping or an object with fields.
    """
    if isinstance(raw, float) and not math.isfinite(raw):
        raise RecipeError(f"{prefix}: {raw} is not a finite number; write one")
    if isinstance(raw, bool) and isinstance(value, int | float) and not isinstance(value, bool):
        raise RecipeError(f"{prefix}: {str(raw).lower()} is no number; write one")
    dot = f"{prefix}." if prefix else ""
    if isinstance(raw, Mapping):
        for key, item in raw.items():
            made = value.get(key) if isinstance(value, Mapping) else getattr(value, str(key), None)
            refuse_odd_values(item, made, f"{dot}{key}")
    elif isinstance(raw, list | tuple):
        values = value if isinstance(value, list | tuple) and len(value) == len(raw) else [value] * len(raw)
        for number, (item, made) in enumerate(zip(raw, values, strict=True)):
            refuse_odd_values(item, made, f"{dot}{number}")


def _plain(value: Any) -> Any:
    """Mappings and sequences as dicts and lists, paths as text; the rest as it is."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of the raw recipe from `key=value`."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override!r:.120}: write key=value, such as method.scale=0.5")
    *path, last = key.strip().split(".")
    try:
        value = parse_yaml(text)
    except ValueError:
        raise RecipeError(
            f"--set {override!r:.120}: {text!r:.120} is not a YAML value; write a number, text or list"
        ) from None
    target = raw
    for step in path:
        if step == "method":
            target["method"] = with_name(target.get("method")) or {}
        inner = target.setdefault(step, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override!r:.120}: {step} is {inner!r:.60}, not a mapping; write {step}=VALUE")
        target = inner
    target[last] = value


def with_name(method: Any) -> dict[str, Any] | None:
    """The method section as a mapping; a bare name stands for its defaults."""
    if method is None or isinstance(method, dict):
        return method
    if isinstance(method, str):
        return {"name": method}
    raise RecipeError(
        f"method: {method!r} is neither a name nor a mapping with a name; write {{name: task_arithmetic}}"
    )


def as_recipe_error(error: ValidationError, prefix: str, keys: Any) -> RecipeError:
    """Pydantic's errors in our words: path, value, what is expected; the branches of a union become one line."""
    lines: dict[str, tuple[list[str], str]] = {}
    found = error.errors(include_url=False)
    for item in found:
        same = [other for other in found if other["loc"][:-1] == item["loc"][:-1] and other["input"] == item["input"]]
        path = prefix + ".".join(str(step) for step in (item["loc"][:-1] if len(same) > 1 else item["loc"]))
        if item["type"] == "extra_forbidden":
            lines[path] = [f"unknown key{nearest(str(item['loc'][-1]), keys)}"], ""
        elif item["type"] in ("missing", "missing_argument"):
            lines[path] = ["missing; write it"], ""
        else:
            said = re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping", item["msg"])
            said = (
                said.removeprefix("Value error, ").replace("a valid tuple", "a list").replace("a valid list", "a list")
            )
            lines.setdefault(path, ([], f", got {item['input']!r}"))[0].append(said)
    return RecipeError(
        "; ".join(f"{path}: {' or '.join(dict.fromkeys(expected))}{got}" for path, (expected, got) in lines.items())
    )


def located(raw: Any, folder: Path, prefix: str = "") -> Any:
    """The raw mapping of a recipe file, with relative paths that exist only in its `folder` resolved against it.

    Raises:
        RecipeError: a path that begins with ./ or ../ exists neither in the working directory nor in `folder`.
    """
    if not isinstance(raw, dict):
        return raw
    return {key: _located(value, folder, str(key), f"{prefix}{key}") for key, value in raw.items()}


def _located(value: Any, folder: Path, key: str, path: str) -> Any:
    if isinstance(value, dict):
        return located(value, folder, f"{path}.")
    if isinstance(value, list):
        return [_located(item, folder, key, path) for item in value]
    if key not in PATHS or not isinstance(value, str):
        return value
    place = place_of(value, folder)
    if place == value and _named(value) and value.startswith(("./", "../")) and not os.path.lexists(value):
        raise RecipeError(f"{path}: {value} is neither here nor in {folder}; say where it is: --set {path}=PATH")
    return place


def place_of(value: str, folder: Path) -> str:
    """A relative path that exists only in `folder` as the path there; any other text as it is."""
    elsewhere = _named(value) and not os.path.lexists(value) and os.path.lexists(folder / value)
    return str(folder / value) if elsewhere else value


def _named(value: str) -> bool:
    """Whether a text can be a path."""
    return 0 < len(value) <= 1000 and "\0" not in value
