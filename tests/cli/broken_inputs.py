"""Faults of a merge's inputs: each breaks a place on the trio, and gives what its refusal must say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.recipe_place import Place

WEIGHTS = "model.safetensors"


UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"


Fault = Callable[[Place], list[str]]


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the weights of a folder after `change`."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shards(folder: Path) -> dict[str, str]:
    """Cut the weights of a folder in two shards with an index; its map from tensor to file."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    weight_map = {name: file for file, members in parts.items() for name in members}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def missing_shard(place: Place) -> list[str]:
    folder = place.copy("donor")
    shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return ["donor/model-00002-of-00002.safetensors", "missing", "download"]


def truncated_shard(place: Place) -> list[str]:
    folder = place.copy("vlm")
    shards(folder)
    file = folder / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    return ["vlm/model-00002-of-00002.safetensors", "truncated", "download"]


def absent_tensor(place: Place) -> list[str]:
    folder = place.copy("base")
    weight_map = shards(folder) | {"model.layers.9.nowhere.weight": "model-00001-of-00002.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [f"base/{WEIGHTS}.index.json", "model.layers.9.nowhere.weight", "does not have it"]


def other_shape(place: Place) -> list[str]:
    for name in ("donor", "base"):
        edit(place.copy(name), lambda tensors: tensors.update({UP: tensors[UP][:, :64].contiguous()}))
    return ["layers.1.mlp.up_proj.weight", "[256, 64]", "[256, 128]"]


def other_family(place: Place) -> list[str]:
    folder = place.copy("donor")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return [str(folder), "llama", "qwen2", "choose a donor"]


def zero_task_vector(place: Place) -> list[str]:
    place.copy("donor", source="base")
    return ["task vector is zero", "donor", "same weights"]


def same_folder(place: Place) -> list[str]:
    place.recipe["donor_base"] = place.recipe["donor"]
    return ["donor_base", "same folder", "task vector is zero"]


def poison(name: str, tensor: str, value: float) -> Fault:
    def fault(place: Place) -> list[str]:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[next(key for key in tensors if key.endswith(tensor))].view(-1)[-1] = value

        edit(place.copy(name), change)
        return [tensor.removeprefix("model."), f"{name}/{WEIGHTS}", "NaN or infinity"]

    return fault


def unknown_key(place: Place) -> list[str]:
    place.recipe["donor_bass"] = place.recipe.pop("donor_base")
    return ["donor_bass", "donor_base"]


def unknown_option(place: Place) -> list[str]:
    place.recipe["method"]["scael"] = 1.0
    return ["method.scael", "scale"]


def output_exists(place: Place) -> list[str]:
    place.out.mkdir()
    (place.out / "mine.txt").write_text("keep me")
    return [str(place.out), "exists", "another"]


def output_is_input(place: Place) -> list[str]:
    place.out = place.folder / "donor"
    return [str(place.out), "is the input", "another"]


def output_inside_input(place: Place) -> list[str]:
    place.out = place.copy("vlm") / "merged"
    return [str(place.out), "lies inside", "another"]


FAULTS: dict[str, Fault] = {
    "missing shard": missing_shard,
    "truncated shard": truncated_shard,
    "index names an absent tensor": absent_tensor,
    "donor of another shape": other_shape,
    "donor of another family": other_family,
    "donor equals its base": zero_task_vector,
    "donor and base are one folder": same_folder,
    "NaN in the donor": poison("donor", DOWN, float("nan")),
    "infinity in the donor's base": poison("base", UP, float("inf")),
    "NaN in the VLM": poison("vlm", DOWN.removeprefix("model."), float("nan")),
    "unknown recipe key": unknown_key,
    "unknown method option": unknown_option,
    "output exists": output_exists,
    "output is an input": output_is_input,
    "output inside an input": output_inside_input,
}
