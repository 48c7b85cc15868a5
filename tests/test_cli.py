"""The command line: what is refused, with which words, and that nothing is left behind; then what is answered."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from vlmgraft import pipeline

WEIGHTS = "model.safetensors"
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"
METHODS = ("task_arithmetic", "frism")
Fault = Callable[["Place"], list[str]]


class Place:
    """A folder with links to the trio, a recipe, and room for the output; a fault replaces a link by a broken copy."""

    def __init__(self, folder: Path, trio: Path, method: str) -> None:
        self.folder, self.out = folder, folder / "out" / "merged"
        self.out.parent.mkdir()
        for name in ("base", "vlm", "donor"):
            (folder / name).symlink_to(trio / name)
        self.recipe: dict[str, Any] = {
            "vlm": str(folder / "vlm"),
            "donor": str(folder / "donor"),
            "donor_base": str(folder / "base"),
            "method": {"name": method},
        }
        if method == "frism":
            Image.new("RGB", (128, 16)).save(folder / "grey.png")
            question = {"question": "read all glyphs", "image": "grey.png"}
            (folder / "calibration.jsonl").write_text((json.dumps(question) + "\n") * 4)
            calibration = {"data": str(folder / "calibration.jsonl"), "samples": 4, "max_new_tokens": 4}
            self.recipe["method"] |= {"steps": 0, "inject_weight": 0.1, "calibration": calibration}

    def copy(self, name: str, source: str | None = None) -> Path:
        """Replace the link `name` by a copy, of another model of the trio if `source` says so."""
        real = (self.folder / (source or name)).resolve()
        (self.folder / name).unlink()
        shutil.copytree(real, self.folder / name)
        return self.folder / name

    def write(self) -> Path:
        """The recipe file."""
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        return path

    def files(self) -> dict[str, tuple[int, int] | None]:
        """Every path below the folder, hidden ones too; of files size and time of the last change."""
        found = [(path, path.stat()) for path in sorted(self.folder.rglob("*")) if path.name != "recipe.yaml"]
        return {str(path): None if path.is_dir() else (stat.st_size, stat.st_mtime_ns) for path, stat in found}


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_refused_before_anything_is_written(
    fault: str, method: str, trio: Path, tmp_path: Path, vlmgraft: Any
) -> None:
    place = Place(tmp_path, trio, method)
    said = FAULTS[fault](place)
    before = place.files()
    ran = vlmgraft("merge", place.write(), "--out", place.out, "--quiet")
    assert ran.code == 2, ran.err
    assert [part for part in said if part not in ran.err] == [], ran.err
    assert ran.err.startswith("vlmgraft: ") and "Traceback" not in ran.err
    assert place.files() == before


@pytest.mark.parametrize("method", METHODS)
def test_the_same_place_without_a_fault_merges(method: str, trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, method)
    ran = vlmgraft("merge", place.write(), "--out", place.out, "--quiet", "--json")
    assert ran.code == 0, ran.err
    receipt = json.loads(ran.out)
    assert receipt == json.loads((place.out / "receipt.json").read_text())
    assert sum(tensor["verdict"] == "merged" for tensor in receipt["tensors"]) == 4 * 7
    assert [path.name for path in place.out.parent.iterdir()] == ["merged"], "no leftovers beside the output"


@pytest.mark.parametrize(
    ("key", "value", "said"), [("data", "absent.jsonl", "absent.jsonl"), ("samples", 0, "samples")]
)
def test_frism_reads_its_calibration_first(
    key: str, value: Any, said: str, trio: Path, tmp_path: Path, vlmgraft: Any
) -> None:
    place = Place(tmp_path, trio, "frism")
    place.recipe["method"]["calibration"][key] = value
    before = place.files()
    ran = vlmgraft("merge", place.write(), "--out", place.out, "--quiet")
    assert (ran.code, place.files()) == (2, before)
    assert said in ran.err


def test_an_image_that_is_missing_is_named_with_its_line(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "frism")
    (tmp_path / "grey.png").unlink()
    ran = vlmgraft("merge", place.write(), "--out", place.out, "--quiet")
    assert ran.code == 2
    assert "calibration.jsonl, line 1" in ran.err and "grey.png" in ran.err
    assert not list(place.out.parent.iterdir())


@pytest.mark.parametrize("arguments", [[], ["recipe.yaml"], ["absent.yaml", "--out", "merged"]])
def test_missing_arguments_are_input_errors(
    arguments: list[str], trio: Path, tmp_path: Path, vlmgraft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Place(tmp_path, trio, "task_arithmetic").write()
    ran = vlmgraft("merge", *arguments)
    assert ran.code == 2
    assert ran.err.startswith("vlmgraft: ")


@pytest.mark.parametrize("arguments", [["merge", "--nonsense"], ["nonsense"], ["lab", "nonsense"]])
def test_unknown_commands_and_options_are_input_errors(arguments: list[str], vlmgraft: Any) -> None:
    assert vlmgraft(*arguments).code == 2


def test_schema_is_json_and_refuses_unknown_keys(vlmgraft: Any) -> None:
    schema = json.loads(vlmgraft("merge", "--schema").out)
    assert {"vlm", "donor", "method"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_dry_run_gives_the_plan_and_writes_nothing(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    before = place.files()
    told = vlmgraft("merge", place.write(), "--dry-run", "--out", place.out)
    asked = vlmgraft("merge", place.write(), "--dry-run", "--json")
    assert (told.code, asked.code, place.files()) == (0, 0, before)
    assert "28 merged" in told.out
    plan = json.loads(asked.out)
    assert plan["merged"] == 28
    assert plan["merged"] + plan["kept"] + plan["excluded"] == len(plan["tensors"])
    assert plan["nbytes"] == sum(tensor.numel() * 2 for tensor in load_file(trio / "vlm" / WEIGHTS).values())


def test_set_overrides_the_recipe(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    assert vlmgraft("merge", place.write(), "--out", place.out, "--set", "method.scale=0", "--quiet").code == 0
    assert (place.out / WEIGHTS).read_bytes() == (trio / "vlm" / WEIGHTS).read_bytes()
    assert "method.scael" in vlmgraft("merge", place.write(), "--out", tmp_path / "b", "--set", "method.scael=0").err


def test_inspect_by_recipe_and_by_options_agree(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    models = [
        part for key in ("vlm", "donor", "donor_base") for part in (f"--{key.replace('_', '-')}", place.recipe[key])
    ]
    by_recipe = vlmgraft("inspect", place.write(), "--json")
    by_options = vlmgraft("inspect", *models, "--json")
    assert (by_recipe.code, by_options.code) == (0, 0)
    planned, paired = json.loads(by_recipe.out), json.loads(by_options.out)
    assert planned.pop("cost") and paired.pop("cost") is None, "without a method there is no cost"
    assert planned == paired
    assert planned["layers"] == 4
    assert "28 merged" in vlmgraft("inspect", *models).out
    assert vlmgraft("inspect", "--vlm", place.recipe["vlm"]).code == 2


def test_inspect_refuses_a_truncated_file(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    said = truncated_shard(place)
    ran = vlmgraft("inspect", place.write())
    assert ran.code == 2
    assert all(part in ran.err for part in said)


def test_lab_path_is_the_trio(trio: Path, vlmgraft: Any) -> None:
    assert Path(vlmgraft("lab", "path").out.strip()) == trio


def test_an_interruption_is_130_and_names_the_way_on(
    trio: Path, tmp_path: Path, vlmgraft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    place = Place(tmp_path, trio, "task_arithmetic")
    monkeypatch.setattr(pipeline, "merge", interrupted)
    ran = vlmgraft("merge", place.write(), "--out", place.out)
    assert ran.code == 130
    assert "--resume" in ran.err and "Traceback" not in ran.err


@pytest.mark.parametrize("fault", ["truncated shard", "unknown recipe key"])
def test_exit_code_of_the_process(fault: str, trio: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    said = FAULTS[fault](place)
    entry = [sys.executable, "-c", "from vlmgraft.cli import main; main()"]
    command = [*entry, "merge", str(place.write()), "--out", str(place.out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert all(part in ran.stderr for part in said)
    assert not list(place.out.parent.iterdir())
