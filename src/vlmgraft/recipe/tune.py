"""The recipe of a fine-tuning run: VLM and donor, the prior on gradients, the data, the trainer's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from vlmgraft.errors import RecipeError
from vlmgraft.recipe.source import (
    Strict,
    apply_override,
    as_recipe_error,
    folder_of,
    located,
    naming,
    read_mapping,
    refuse_odd_values,
    refuse_unknown,
)
from vlmgraft.storage.jsonl import write_text
from vlmgraft.storage.listed import listed

Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PriorOptions(Strict):
    """DRIFT's prior; mode none is plain supervised fine-tuning."""

    mode: Literal["adaptive", "grad_norm", "absolute", "none"] = Field("adaptive", description="how far g is pushed")
    strength: float = Field(1.0, ge=0, description="a of the push; 0 pushes nothing")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="decay of the strength to zero")
    modules: tuple[str, ...] | dict[str, Share] = Field(
        ("attention",),
        description="groups, or patterns on tensor names; `pattern: number` is its share of the strength, and a tensor "
        "has that of the first entry that selects it",
    )
    layers: Literal["all"] | int | str | tuple[int, ...] = Field("all", description="all, such as 0-27, or a list")
    delta: Literal["vlm", "base"] = Field("vlm", description="Δ is the donor minus the VLM, or minus the donor's base")
    gates: str | None = Field(None, description="a gates folder: push only along directions that FRISM leaves open")
    factors: str | None = Field(None, description="the factors of the gates; default: `factors` beside the gates")
    rescale: bool = Field(False, description="absolute: Δ at the parameter's norm, as in the released code")
    when: Literal["step", "backward"] = Field("step", description="backward: every backward pass, as released")
    store: Literal["device", "cpu"] = Field("device", description="where Δ lies; cpu saves memory and costs copies")

    def unused(self) -> list[str]:
        """Keys that differ from their defaults and have no effect, because the mode is none."""
        fields = type(self).model_fields.items()
        return [
            f"prior.{k}" for k, f in fields if k != "mode" and self.mode == "none" and getattr(self, k) != f.default
        ]

    @field_validator("modules", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class DataOptions(Strict):
    """What is learned: JSON lines, parquet, or a dataset of the hub (`name` or `name:split`)."""

    train: str = Field(min_length=1, description="the traces to learn")
    validation: str | None = Field(None, description="traces for the trainer's evaluation; see train.eval_strategy")
    columns: dict[str, str] = Field(default_factory=dict, description="our name: the data's name of a column")
    limit: int | None = Field(None, ge=1, description="the first so many rows only")
    add_tokens: tuple[str, ...] = Field((), description="tokens to add to the vocabulary, such as <think>")


class TuneRecipe(Strict):
    """A validated recipe of `vlmgraft tune`. `train` holds fields of TRL's SFTConfig (and `epochs`)."""

    vlm: str = Field(
        min_length=1, description="the vision-language model: a local folder or a hub id, optionally with @revision"
    )
    donor: str | None = Field(
        None, min_length=1, description="the text model to move towards; not needed with prior.mode none"
    )
    donor_base: str | None = Field(
        None, min_length=1, description="the model the donor was tuned from, for delta: base"
    )
    prior: PriorOptions = Field(default_factory=lambda: PriorOptions.model_validate({}))
    data: DataOptions
    lora: dict[str, Any] | None = Field(None, description="fields of peft's LoraConfig; without it all weights train")
    merge_adapter: bool = Field(False, description="with lora: publish the merged checkpoint, not the adapter")
    freeze_vision: bool = Field(True, description="train the language model only")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights while they are trained")
    train: dict[str, Any] = Field(default_factory=dict, description="fields of the trainer's arguments")


def load_tune_recipe(source: str | Path | Mapping[str, Any] | TuneRecipe, overrides: Sequence[str] = ()) -> TuneRecipe:
    """Read, override and validate a tune recipe; raises RecipeError with path, value and the nearest valid key."""
    if isinstance(source, TuneRecipe):
        if overrides:
            raise RecipeError(f"{listed(overrides)[0]}: the recipe is validated already; give its file or mapping")
        return source
    with naming(source):
        return _load(read_mapping(source), listed(overrides), folder_of(source))


def _load(raw: dict[str, Any], overrides: Sequence[str], folder: Path) -> TuneRecipe:
    """A recipe from its raw mapping; relative paths are also looked for in `folder`."""
    for override in overrides:
        apply_override(raw, override)
    raw = located(raw, folder)
    if isinstance(raw.get("prior"), str):
        raw["prior"] = {"mode": raw["prior"]}
    refuse_unknown(raw, TuneRecipe.model_fields, "")
    for key, options in (("prior", PriorOptions), ("data", DataOptions)):
        if isinstance(raw.get(key), dict):
            refuse_unknown(raw[key], options.model_fields, f"{key}.")
    try:
        recipe = TuneRecipe.model_validate(raw)
    except ValidationError as error:
        raise as_recipe_error(error, "", TuneRecipe.model_fields) from None
    refuse_odd_values(raw, recipe)
    _refuse_contradictions(recipe)
    return recipe


def _refuse_contradictions(recipe: TuneRecipe) -> None:
    prior = recipe.prior
    if prior.mode != "none" and not recipe.donor:
        raise RecipeError("donor: missing; give the text model to move towards, or write prior: {mode: none}")
    if (prior.delta == "base" or prior.gates) and prior.mode != "none" and not recipe.donor_base:
        raise RecipeError("donor_base: missing; prior.delta base and prior.gates are about the donor minus its base")
    if prior.factors and not prior.gates:
        raise RecipeError("prior.factors: are those of prior.gates; give both, or neither")
    if prior.rescale and prior.mode not in ("absolute", "none"):
        raise RecipeError(f"prior.rescale: only absolute takes Δ at a length of its own, not {prior.mode}")
    if recipe.merge_adapter and recipe.lora is None:
        raise RecipeError("merge_adapter: there is no adapter without `lora`")
    if prior.when == "backward" and recipe.lora is not None and prior.mode != "none":
        raise RecipeError("prior.when: backward is for whole parameters; with lora push once per step")


def dump_tune_recipe(recipe: TuneRecipe) -> dict[str, Any]:
    """The recipe as plain values, every option written out; loading it gives an equal recipe."""
    return recipe.model_dump(mode="json", exclude_none=True)


def save_tune_recipe(recipe: TuneRecipe, path: Path) -> None:
    """Write the recipe as YAML, atomically."""
    write_text(path, yaml.safe_dump(dump_tune_recipe(recipe), sort_keys=False, allow_unicode=True))
