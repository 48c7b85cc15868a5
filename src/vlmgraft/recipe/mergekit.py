"""Reads mergekit's recipe format for the methods both tools have, or says what to write instead.

mergekit treats its models alike; here one is the VLM (it keeps its tower and its names) and one the donor. The VLM is
the model whose local config.json mentions a vision tower, else the first of `models`. With `base_model: B`,

    B + 1·(V − B) + w·(D − B)  =  V + w·(D − B),

so mergekit's task_arithmetic with a weight of one on the VLM is ours with `scale: w`. mergekit breaks ties of equal
magnitudes by position; here they are kept or dropped together. Random numbers differ from mergekit's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlmgraft.alignment.families import has_tower
from vlmgraft.checkpoint.adapter import CONFIG
from vlmgraft.checkpoint.files import load_json
from vlmgraft.checkpoint.folder import is_folder
from vlmgraft.checkpoint.index import read_config
from vlmgraft.errors import RecipeError
from vlmgraft.recipe.source import place_of

_OF_MODELS = ("weight", "density")
SHARED: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight", "normalize"),
    "slerp": ("t",),
    "task_arithmetic": ("weight", "normalize", "lambda"),
    "ties": (*_OF_MODELS, "normalize", "lambda", "rescale"),
    "dare_linear": (*_OF_MODELS, "normalize", "lambda", "rescale"),
    "dare_ties": (*_OF_MODELS, "normalize", "lambda", "rescale"),
    "della": (*_OF_MODELS, "epsilon", "normalize", "lambda", "rescale"),
    "della_linear": (*_OF_MODELS, "epsilon", "normalize", "lambda", "rescale"),
    "breadcrumbs": (*_OF_MODELS, "gamma", "normalize", "lambda", "rescale"),
    "breadcrumbs_ties": (*_OF_MODELS, "gamma", "normalize", "lambda", "rescale"),
    "sce": ("select_topk",),
    "model_stock": ("filter_wise",),
}
"""The mergekit methods that are translated, and the parameters that mergekit reads for each, besides int8_mask."""
_ONLY_MERGEKIT = ("merge_method", "models", "base_model", "slices")
_DROPPED = {
    "dtype": "dtypes are the VLM's",
    "out_dtype": "dtypes are the VLM's",
    "tokenizer_source": "the tokenizer is the VLM's",
    "tokenizer": "the tokenizer is the VLM's",
    "chat_template": "the chat template is the VLM's",
    "name": "the output folder is a command-line option",
}
_OURS = {"della_linear": "della", "breadcrumbs_ties": "breadcrumbs"}
_BASELESS = ("linear", "slerp")
_ELECTING = ("ties", "dare_ties", "della", "breadcrumbs_ties")
_NORMALIZED = ("ties", "della")


def is_mergekit(raw: Mapping[str, Any]) -> bool:
    """Whether a mapping is written in mergekit's format."""
    return any(key in raw for key in _ONLY_MERGEKIT)


def translate(raw: Mapping[str, Any], folder: Path = Path()) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Our recipe for a mergekit recipe, and notes on what was assumed or dropped.

    folder: of the recipe's file, where relative paths are also looked for.

    Raises:
        RecipeError: another method, slices, more than two models, or weights that have no counterpart here.
    """
    if "slices" in raw:
        raise RecipeError(
            "slices: not read from mergekit recipes; write vlm:, donor:, donor_base: and choose `layers: 0-27`"
        )
    name = raw.get("merge_method")
    if not isinstance(name, str) or name not in SHARED:
        raise RecipeError(
            f"merge_method: {name!r:.80} is not shared with mergekit; shared are {', '.join(SHARED)}. {_HOW}"
        )
    for key in raw:
        if key not in (*_ONLY_MERGEKIT, *_DROPPED, "parameters"):
            raise RecipeError(f"{key}: this key of a mergekit recipe has no counterpart. {_HOW}")
    shared = _known(raw.get("parameters") or {}, "parameters", name)
    (vlm, ours), (donor, theirs), base, notes = _roles(raw, name, folder)
    notes += [f"{key}: dropped, {why}" for key, why in _DROPPED.items() if key in raw]
    if name.startswith(("dare", "della")):
        notes.append(f"{name}: other entries are dropped than mergekit's, whose random numbers are its own")
    if name in _ELECTING:
        notes.append(f"{name}: where weighted task vectors cancel, nothing is added; mergekit adds the positive ones")
    if name.startswith("dare") and shared.get("rescale", True):
        notes.append("dare: what is kept is divided by the density; mergekit gives every tensor its L1 norm back")
    recipe: dict[str, Any] = {"vlm": vlm, "donor": donor, "modules": ["all"]}
    if base is not None and name not in _BASELESS:
        recipe["donor_base"] = base
        if name != "task_arithmetic":
            recipe["vlm_base"] = base
    if name == "slerp":
        recipe["method"] = {"name": name, "t": _slerp_share(shared, base_is_vlm=base == vlm)}
    else:
        recipe["method"] = _method(name, ours, theirs, shared)
    return recipe, (*notes, "mergekit recipe translated; modules: [all] but embeddings and head, which stay the VLM's")


_HOW = "Write vlm:, donor:, donor_base: and method: {name: …, …} instead."


def _method(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """The method that computes what mergekit computes. ours, theirs: parameters of the VLM and the donor."""
    if name == "sce":
        return {"name": name, "density": _number(shared.get("select_topk", 1.0), "select_topk")}
    if name == "model_stock":
        return {"name": name, "filter_wise": bool(shared.get("filter_wise", False))}
    weights = [_number(options.get("weight", shared.get("weight", 1.0)), "weight") for options in (ours, theirs)]
    scale = _number(shared.get("lambda", 1.0), "lambda")
    normalize = bool(shared.get("normalize", name in (*_NORMALIZED, "linear")))
    if name == "linear":
        return {"name": name, **_linear(weights, normalize)}
    if name == "task_arithmetic":
        if normalize or abs(scale * weights[0] - 1) > 1e-9:
            raise RecipeError(
                f"weight: the VLM's is {weights[0]}, but task_arithmetic adds to the VLM as it is; give it weight 1 "
                "without normalize, or write method: {name: task_arithmetic, scale: λ} with the donor's share as λ"
            )
        return {"name": name, "scale": scale * weights[1]}
    densities = [options.get("density", shared.get("density", 1.0)) for options in (ours, theirs)]
    electing = name in _ELECTING
    if not electing and normalize and abs(sum(weights)) > 1e-8:  # no sign election excludes one
        weights = [weight / sum(weights) for weight in weights]
    method: dict[str, Any] = {"density": densities[0], "weights": weights, "scale": scale}
    if densities[0] != densities[1]:
        method["donor_density"] = densities[1]
    if electing:
        method |= {"election": "weighted", "combine": "weighted_mean" if normalize else "sum"}
    thinning = _thinning(name, [{**shared, **options} for options in (ours, theirs)])
    return {"name": _OURS.get(name, name), **method, **thinning}


def _linear(weights: list[float], normalize: bool) -> dict[str, Any]:
    total = sum(weights)
    if not normalize:
        return {"vlm_weight": weights[0], "weight_sum": total}
    if total == 0:
        raise RecipeError(f"weight: {weights} add up to zero and cannot be normalized; give other weights")
    return {"vlm_weight": weights[0] / total}


def _thinning(name: str, parameters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Options for sparsifying task vectors. parameters: of VLM and donor, each merged with the recipe's."""
    rescale = parameters[0].get("rescale")
    if name == "ties" or name.startswith("breadcrumbs"):
        if rescale:
            raise RecipeError(f"rescale: {name} does not rescale here; remove it")
        if name == "ties":
            return {"trim": "tensor"}
        return {"gamma": _common("gamma", parameters, 0.01)}
    if name.startswith("dare"):
        return {} if rescale is None else {"rescale": bool(rescale)}
    options = {"epsilon": _common("epsilon", parameters, 0.15), "rescale": "none" if rescale is False else "l1"}
    return options if name == "della" else {**options, "election": "none"}


def _common(key: str, parameters: Sequence[Mapping[str, Any]], default: float) -> float:
    """A parameter that must be equal for both models."""
    values = [_number(options.get(key, default), key) for options in parameters]
    if values[0] != values[1]:
        raise RecipeError(f"{key}: {values} differ between the models; give both the same")
    return values[0]


def _slerp_share(shared: Mapping[str, Any], *, base_is_vlm: bool) -> float:
    """The donor's share; mergekit's t counts from its base_model."""
    if "t" not in shared:
        raise RecipeError("parameters.t: missing; slerp needs it, 0 for base_model to 1 for the other model")
    t = _number(shared["t"], "t")
    return t if base_is_vlm else 1 - t


def _roles(raw: Mapping[str, Any], name: str, folder: Path) -> tuple[Any, Any, str | None, list[str]]:
    """(VLM, its parameters), (donor, its parameters), base, notes."""
    entries: list[tuple[str, Mapping[str, Any]]] = []
    notes: list[str] = []
    given = raw.get("base_model")
    base = None if given is None else _reference(given, "base_model", notes, folder)
    listed = raw.get("models") or []
    if not isinstance(listed, list):
        raise RecipeError(f"models: {listed!r:.60} is no list. {_HOW}")
    for number, entry in enumerate(listed):
        if not isinstance(entry, Mapping) or "model" not in entry:
            raise RecipeError(f"models[{number}]: {entry!r:.60} has no `model`. {_HOW}")
        for key in entry:
            if key not in ("model", "parameters"):
                raise RecipeError(f"models[{number}].{key}: mergekit ignores it here; write it under `parameters:`")
        model = _reference(entry["model"], f"models[{number}].model", notes, folder)
        if model != base or name in _BASELESS:
            where = f"models[{number}].parameters"
            entries.append((model, _known(entry.get("parameters") or {}, where, name)))
    if len(entries) != 2:
        raise RecipeError(f"models: {len(entries)} besides the base; here one VLM and one donor are merged. {_HOW}")
    if name != "linear" and base is None:
        raise RecipeError(f"base_model: {name} needs it. {_HOW}")
    if name == "slerp" and base not in [model for model, _ in entries]:
        raise RecipeError(f"base_model: {base!r} is neither of the two models; slerp starts from one of them")
    local = [_is_vlm(model) for model, _ in entries]
    if local[1] and not local[0]:
        entries.reverse()
    if not any(local):
        notes.append(f"the first model, {entries[0][0]}, is taken as the VLM")
    return entries[0], entries[1], base, notes


def _reference(value: Any, where: str, notes: list[str], folder: Path) -> str:
    """The folder or hub id that a reference names: a string, `base+lora`, or mergekit's mapping of both with revisions.

    An adapter stands for its base with the adapter applied; that base must be the one given here.
    """
    known = {"model", "lora"} if isinstance(value, Mapping) else set()
    pair: Any = value
    if isinstance(value, str):
        model, plus, lora = value.partition("+")
        pair = {"model": value} if not plus or is_folder(place_of(value, folder)) else {"model": model, "lora": lora}
    elif not known or set(value) - known or "model" not in value:
        raise RecipeError(f"{where}: {value!r:.80} is no path or hub id, nor model: and lora: with path: and revision:")
    base, adapter = (_path(pair[key], where) if pair.get(key) else None for key in ("model", "lora"))
    found = place_of(str(base), folder)
    if adapter is None:
        return found
    adapter = place_of(adapter, folder)
    if not is_folder(adapter):
        notes.append(f"{adapter}: is put on the base that its adapter_config.json names; the recipe says {base}")
    elif (named := load_json(Path(adapter) / CONFIG).get("base_model_name_or_path")) not in (base, found):
        raise RecipeError(
            f"{where}: puts the adapter {adapter} on {base}, but its {CONFIG} names {named!r:.120}; write {base} there"
        )
    return adapter


def _path(value: Any, where: str) -> str:
    """A model's path, with its revision after an @."""
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and set(value) <= {"path", "revision"}:
        return f"{value['path']}@{value['revision']}" if value.get("revision") else str(value["path"])
    if not isinstance(value, str):
        raise RecipeError(f"{where}: {value!r:.80} is no path; write path: and revision:")
    return value


def _is_vlm(model: str) -> bool:
    """Whether a local folder's config.json mentions a vision tower."""
    return is_folder(model) and has_tower(read_config(Path(model)))


def _known(parameters: Mapping[str, Any], where: str, name: str) -> Mapping[str, Any]:
    """Refuse parameters that are not translated."""
    if not isinstance(parameters, Mapping):
        raise RecipeError(f"{where}: {parameters!r:.60} is no mapping. {_HOW}")
    for key in parameters:
        if key not in (*SHARED[name], "int8_mask"):
            raise RecipeError(f"{where}.{key}: not translated from mergekit's {name}. {_HOW}")
    return parameters


def _number(value: Any, key: str) -> float:
    """A plain number; mergekit's gradients and filters are refused."""
    if isinstance(value, str):  # YAML reads 3e-1 as a string; mergekit converts it
        with suppress(ValueError):
            return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{key}: {value!r} is not a plain number; write gradients over layers in our format. {_HOW}")
    return float(value)
