"""Reads mergekit's recipe format for the methods both tools have, or says what to write instead.

mergekit merges equals; here one model is the VLM (it keeps its tower and its names) and one the donor. The VLM is the
model whose config.json names a VLM family when its folder is local, else the first of `models`. With `base_model: B`,

    B + 1·(V − B) + w·(D − B)  =  V + w·(D − B),

so mergekit's task_arithmetic with a weight of one on the VLM is ours with `scale: w`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmgraft.alignment.families import find_family
from vlmgraft.checkpoint.index import is_folder, read_config
from vlmgraft.errors import RecipeError

SHARED = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
_ONLY_MERGEKIT = ("merge_method", "models", "base_model", "slices")
_DROPPED = {
    "dtype": "dtypes are the VLM's",
    "out_dtype": "dtypes are the VLM's",
    "tokenizer_source": "the tokenizer is the VLM's",
    "tokenizer": "the tokenizer is the VLM's",
    "chat_template": "the chat template is the VLM's",
    "name": "the output folder is a command-line option",
}
_GLOBAL = ("weight", "density", "normalize", "lambda", "rescale", "int8_mask")


def is_mergekit(raw: Mapping[str, Any]) -> bool:
    """Whether a mapping is written in mergekit's format."""
    return any(key in raw for key in _ONLY_MERGEKIT)


def translate(raw: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Our recipe for a mergekit recipe, and notes on what was assumed or dropped.

    Raises:
        RecipeError: another method, slices, more than two models, or weights that have no counterpart here.
    """
    if "slices" in raw:
        raise RecipeError(
            "slices: not read from mergekit recipes; write vlm:, donor:, donor_base: and choose `layers: 0-27`"
        )
    name = raw.get("merge_method")
    if name not in SHARED:
        raise RecipeError(f"merge_method: {name!r} is not shared with mergekit; shared are {', '.join(SHARED)}. {_HOW}")
    for key in raw:
        if key not in (*_ONLY_MERGEKIT, *_DROPPED, "parameters"):
            raise RecipeError(f"{key}: this key of a mergekit recipe has no counterpart. {_HOW}")
    shared = _known(raw.get("parameters") or {}, "parameters")
    (vlm, ours), (donor, theirs), base, notes = _roles(raw, str(name))
    weights = [_number(options.get("weight", shared.get("weight", 1.0)), "weight") for options in (ours, theirs)]
    densities = [options.get("density", shared.get("density", 1.0)) for options in (ours, theirs)]
    notes += [f"{key}: dropped, {why}" for key, why in _DROPPED.items() if key in raw]
    if str(name).startswith("dare"):
        notes.append("dare: other entries are dropped than mergekit's, whose seed and rescaling (L1 norm) are its own")
    recipe: dict[str, Any] = {"vlm": vlm, "donor": donor, "modules": ["all"]}
    if base is not None:
        recipe["donor_base"] = base
        if name not in ("linear", "task_arithmetic"):
            recipe["vlm_base"] = base
    recipe["method"] = {"name": name, **_options(str(name), weights, densities, shared)}
    return recipe, (*notes, "mergekit recipe translated; modules: [all] but embeddings and head, which stay the VLM's")


_HOW = "Write vlm:, donor:, donor_base: and method: {name: …, …} instead."


def _options(name: str, weights: list[float], densities: list[Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """The method options that compute what mergekit computes."""
    scale = _number(shared.get("lambda", 1.0), "lambda")
    if name == "linear":
        total = sum(weights)
        if total == 0 or (shared.get("normalize", True) is False and abs(total - 1) > 1e-9):
            raise RecipeError(f"weight: {weights} do not add up to one; write method: {{name: linear, vlm_weight: …}}")
        return {"vlm_weight": weights[0] / total}
    if name == "task_arithmetic":
        if shared.get("normalize") or abs(scale * weights[0] - 1) > 1e-9:
            raise RecipeError(
                f"weight: the VLM's is {weights[0]}, but task_arithmetic adds to the VLM as it is; give it weight 1 "
                "without normalize, or write method: {name: task_arithmetic, scale: λ} with the donor's share as λ"
            )
        return {"scale": scale * weights[1]}
    if densities[0] != densities[1]:
        raise RecipeError(
            f"density: {densities} differ between the models; write one, method: {{name: {name}, density: …}}"
        )
    options: dict[str, Any] = {"density": densities[0], "weights": weights, "scale": scale}
    if name == "ties":
        combine = "weighted_mean" if shared.get("normalize", True) else "sum"
        return {**options, "trim": "tensor", "election": "weighted", "combine": combine}
    if name == "dare_ties":
        combine = "weighted_mean" if shared.get("normalize", False) else "sum"
        options |= {"election": "weighted", "combine": combine}
    elif shared.get("normalize") and abs(sum(weights)) > 1e-8:  # dare_linear: no sign decides who shares
        options["weights"] = [weight / sum(weights) for weight in weights]
    if "rescale" in shared:
        options["rescale"] = bool(shared["rescale"])
    return options


def _roles(raw: Mapping[str, Any], name: str) -> tuple[Any, Any, str | None, list[str]]:
    """(VLM, its parameters), (donor, its parameters), base, notes."""
    entries = []
    base = raw.get("base_model")
    listed = raw.get("models") or []
    if not isinstance(listed, list):
        raise RecipeError(f"models: {listed!r:.60} is no list. {_HOW}")
    for number, entry in enumerate(listed):
        if not isinstance(entry, Mapping) or "model" not in entry:
            raise RecipeError(f"models[{number}]: {entry!r:.60} has no `model`. {_HOW}")
        if entry["model"] != base or name == "linear":
            entries.append((str(entry["model"]), _known(entry.get("parameters") or {}, f"models[{number}].parameters")))
    if len(entries) != 2:
        raise RecipeError(f"models: {len(entries)} besides the base; here one VLM and one donor are merged. {_HOW}")
    if name != "linear" and base is None:
        raise RecipeError(f"base_model: {name} needs it. {_HOW}")
    local = [_is_vlm(model) for model, _ in entries]
    if local[1] and not local[0]:
        entries.reverse()
    notes = [] if any(local) else [f"the first model, {entries[0][0]}, is taken as the VLM"]
    return entries[0], entries[1], None if name == "linear" else str(base), notes


def _is_vlm(model: str) -> bool:
    """Whether a local folder's config.json names a listed VLM family."""
    return is_folder(model) and find_family(read_config(Path(model))) is not None


def _known(parameters: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Refuse parameters that are not translated."""
    if not isinstance(parameters, Mapping):
        raise RecipeError(f"{where}: {parameters!r:.60} is no mapping. {_HOW}")
    for key in parameters:
        if key not in _GLOBAL:
            raise RecipeError(f"{where}.{key}: not translated from mergekit. {_HOW}")
    return parameters


def _number(value: Any, key: str) -> float:
    """A plain number; gradients and filters are mergekit's own."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{key}: {value!r} is not a plain number; write gradients over layers in our format. {_HOW}")
    return float(value)
