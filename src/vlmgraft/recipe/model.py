"""The recipe: what is merged into what, by which method, over which modules and layers, and how it is written.

Loading is strict: the error for an unknown key names the nearest valid one, the error for an invalid value its path and
the value. A loaded recipe holds the method as a frozen dataclass from `methods/`; dumping writes every option with its
value, so that the file replays the run. Nothing here loads torch or transformers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, TypeAdapter, ValidationError, field_validator

from vlmgraft.errors import RecipeError
from vlmgraft.methods import METHODS
from vlmgraft.methods.base import DEFAULT_MODULES, Method
from vlmgraft.methods.frism import GatedMethod
from vlmgraft.recipe.mergekit import is_mergekit, translate
from vlmgraft.recipe.source import (
    Strict,
    apply_override,
    as_recipe_error,
    folder_of,
    located,
    naming,
    nearest,
    read_mapping,
    refuse_odd_values,
    refuse_unknown,
    several_donors,
    with_name,
)
from vlmgraft.storage.listed import listed

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(value: str | int) -> int:
    """Bytes of "5GB", "500 MB", "4GiB" or a number; raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise ValueError(f"{value!r} is not a size such as 5GB, 500MB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


class Output(Strict):
    """How the merged checkpoint is written; its names and shapes are the VLM's."""

    dtype: Literal["vlm", "float32"] = Field(
        "vlm",
        description="of merged tensors: the VLM's, or float32, which keeps every change and takes twice the bytes",
    )
    shard_size: str | int = Field("5GB", description="largest size of one file, in bytes or such as 5GB, 500MB, 4GiB")
    overflow: Literal["refuse", "clamp"] = Field(
        "refuse", description="merged values beyond the VLM's dtype: refuse the merge, or clamp them and say how many"
    )
    allow_nonfinite: bool = Field(
        False, description="copy kept tensors that hold NaN or infinity, and say how many values; else they are refused"
    )

    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest", description="to the VLM's dtype: nearest, or up and down at random so that small changes survive"
    )
    seed: int = Field(0, description="of stochastic rounding")

    @field_validator("shard_size")
    @classmethod
    def _readable(cls, value: str | int) -> str | int:
        parse_size(value)
        return value

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes."""
        return parse_size(self.shard_size)


class Donor(Strict):
    """A further donor and the model it was tuned from."""

    donor: str = Field(min_length=1, description="the text model: folder or hub id")
    donor_base: str = Field(min_length=1, description="the model it was tuned from: folder or hub id")


class Recipe(Strict):
    """A validated recipe. `method` is an instance of one of `vlmgraft.methods.METHODS`, or None for an inspection."""

    vlm: str = Field(
        min_length=1, description="the vision-language model: a local folder or a hub id, optionally with @revision"
    )
    donor: str = Field(min_length=1, description="the text model whose reasoning is grafted: folder or hub id")
    donor_base: str | None = Field(
        None, min_length=1, description="the model the donor was tuned from: folder or hub id"
    )
    more_donors: tuple[Donor, ...] = Field(
        (), description="further donors for frism and curvature; `donor` and `donor_base` may also be lists"
    )
    vlm_base: str | None = Field(
        None, min_length=1, description="the text model the VLM was built on; only some methods need it"
    )
    method: Any = Field(None, description="name of a method, or a mapping of its name and options")
    modules: tuple[str, ...] = Field(DEFAULT_MODULES, description="groups, or patterns on tensor names")
    layers: Literal["all"] | int | str | tuple[int, ...] = Field(
        "all", description="all, a range such as 0-27, or a list"
    )
    output: Output = Field(
        default=Output(
            dtype="vlm", shard_size="5GB", overflow="refuse", allow_nonfinite=False, rounding="nearest", seed=0
        ),
        description="how the checkpoint is written",
    )

    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def models(self) -> list[str]:
        """Every model that is named: folders and hub ids."""
        more = [model for other in self.more_donors for model in (other.donor, other.donor_base)]
        return [model for model in (self.vlm, self.donor, self.donor_base, self.vlm_base, *more) if model]

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on what the translation from another tool's format changed."""
        return self._notes


def load_recipe(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, need_method: bool = True
) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        source: a YAML file, or its content as a mapping; mergekit's format is translated for the methods both have.
        overrides: `key=value` with dotted keys and YAML values, such as "method.scale=0.5"; applied after translation.
        need_method: refuse a recipe without `method`.
    Raises:
        RecipeError: with the path, the value, the nearest valid key or what to write instead.
    """
    with naming(source):
        return _load(read_mapping(source), listed(overrides), need_method, folder_of(source))


def _load(raw: dict[str, Any], overrides: Sequence[str], need_method: bool, folder: Path) -> Recipe:
    """A recipe from its raw mapping; relative paths are also looked for in `folder`."""
    notes: tuple[str, ...] = ()
    if is_mergekit(raw):
        raw, notes = translate(raw, folder)
    for override in overrides:
        apply_override(raw, override)
    raw = located(raw, folder)
    several_donors(raw)
    options = with_name(raw.get("method"))
    refuse_unknown(raw, Recipe.model_fields, "", inner=_option_names(options))
    method = _load_method(options) if options is not None else None
    if method is None and need_method:
        raise RecipeError(f"method: missing; write `method: {{name: …}}` with one of {', '.join(METHODS)}")
    for key in sorted(method.needs if method else ()):
        if not raw.get(key):
            raise RecipeError(f"{key}: method {options['name']} needs it" + _WHAT.get(key, "") if options else key)
    if raw.get("more_donors") and not isinstance(method, GatedMethod):
        raise RecipeError("more_donors: several donors need gates of their own; write method frism or curvature")
    if raw.get("modules") is None:
        raw["modules"] = (method or Method).default_modules
    raw["modules"] = [raw["modules"]] if isinstance(raw["modules"], str) else raw["modules"]
    try:
        recipe = Recipe.model_validate({**raw, "method": method})
    except ValidationError as error:
        raise as_recipe_error(error, "", Recipe.model_fields) from None
    refuse_odd_values({**raw, "method": options}, recipe)
    recipe._notes = notes
    return recipe


_WHAT = {
    "donor_base": ": give the model the donor was tuned from (the task vector is their difference)",
    "vlm_base": ": give the text model the VLM was built on (its own task vector is their difference)",
}


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain YAML values, every option written out; `load_recipe` of it gives an equal recipe."""
    plain = recipe.model_dump(mode="json", exclude={"method"}, exclude_none=True)
    if not recipe.more_donors:
        del plain["more_donors"]
    if recipe.method is None:
        return plain
    cls = type(recipe.method)
    unset = {field.name for field in dataclasses.fields(cls) if field.default is None}
    options = TypeAdapter(cls).dump_python(recipe.method, mode="json")
    options = {key: value for key, value in options.items() if value is not None or key not in unset}
    before: dict[str, Any] = {key: plain.pop(key) for key in ("vlm", "donor", "donor_base", "vlm_base") if key in plain}
    return {**before, "method": {"name": cls.name, **options}, **plain}


def _option_names(options: dict[str, Any] | None) -> list[str]:
    """Option names of the method a recipe names, to recognise one that was written a level too high."""
    cls = METHODS.get(str(options.get("name"))) if options else None
    return [field.name for field in dataclasses.fields(cls)] if cls else []


def _load_method(options: dict[str, Any]) -> Method:
    name = options.get("name")
    if not isinstance(name, str) or name not in METHODS:
        near = nearest(str(name), METHODS)
        raise RecipeError(f"method.name: {name!r} is no method{near}; methods: {', '.join(METHODS)}")
    cls, given = METHODS[name], {key: value for key, value in options.items() if key != "name"}
    refuse_unknown(given, cls, "method.")
    try:
        method: Method = TypeAdapter(cls).validate_python(given)
        return method
    except ValidationError as error:
        raise as_recipe_error(error, "method.", [field.name for field in dataclasses.fields(cls)]) from None
    except ValueError as error:
        raise RecipeError(f"method {name}: {error}") from None
