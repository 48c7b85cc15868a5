"""Which files hold a folder's weights: leftovers, pickles, one shard, an adapter beside a model."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmgraft.checkpoint.files import INDEX, SINGLE
from vlmgraft.checkpoint.folder import is_adapter, is_folder, weight_files
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import CheckpointError


def test_leftovers_of_another_save_are_named(tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.ones(2)}, tmp_path / name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w0": names[0]}}))
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*a shard that"):
        open_checkpoint(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"names other files.*another save: remove it"):
        open_checkpoint(tmp_path)


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["w"]


def test_the_command_for_pickles_keeps_every_weight_and_file(trio: Path, tmp_path: Path) -> None:
    """Run word for word on a VLM in two pickled shards, in a folder whose name has a space."""
    folder = tmp_path / "a vlm"
    shutil.copytree(trio / "vlm", folder)
    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    before = sorted(path.name for path in folder.iterdir())
    names = sorted(expected)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        torch.save({name: expected[name] for name in part}, folder / f"pytorch_model-0000{number}-of-00002.bin")
    torch.save({"lr": 1}, folder / "training_args.bin")
    with pytest.raises(CheckpointError, match="has pickled weights only") as refused:
        open_checkpoint(folder)
    command = shlex.split(str(refused.value).split("`")[1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    got = load_file(folder / "model.safetensors")
    assert got.keys() == expected.keys() == open_checkpoint(folder).tensors.keys()
    assert all(got[name].dtype == tensor.dtype and torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert set(before) < {path.name for path in folder.iterdir()}


def test_a_model_and_an_adapter_in_one_folder_are_named(tmp_path: Path) -> None:
    for name in ("model.safetensors", "adapter_model.safetensors"):
        save_file({"w": torch.ones(2)}, tmp_path / name)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a model .* and an adapter .*remove adapter_config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()  # left behind by a merge: no library finds its weights
    assert list(open_checkpoint(tmp_path).tensors) == ["w"]


def index(folder: Path, **shards: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))


def test_the_files_of_a_folder_and_which_tensor_is_where(tmp_path: Path) -> None:
    (tmp_path / "only.safetensors").touch()
    assert weight_files(tmp_path) == ((tmp_path / "only.safetensors",), {})
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).touch()
    index(tmp_path, x="b.safetensors", y="a.safetensors", z="b.safetensors")
    files, tensors = weight_files(tmp_path)
    assert files == (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert tensors == {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"b\.safetensors: missing, but {INDEX} names it"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), f"no {SINGLE} and no {INDEX}; give the folder of a checkpoint"),
        (("a.safetensors", "b.safetensors"), f"2 safetensors files without {INDEX}"),
        (("model-00001-of-00002.safetensors",), "1 safetensors files without"),
        (("q4.gguf", "q8.gguf"), r"holds 2 GGUF files; give one of them, such as .*q4\.gguf"),
        (("pytorch_model.bin",), "pickled weights only, which can run code"),
        (("consolidated.pth",), "pickled weights only, of no known layout"),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(names: tuple[str, ...], said: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=said):
        weight_files(tmp_path)


@pytest.mark.parametrize("weights", [None, [], {}, "x"])
def test_an_index_without_a_map_is_refused(weights: object, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(CheckpointError, match="has no weight_map from tensors to files; download the index again"):
        weight_files(tmp_path)


def test_a_model_is_a_folder_or_a_hub_id(tmp_path: Path) -> None:
    assert is_folder(tmp_path) and not is_folder("organisation/name") and not is_folder(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="the name of a model is empty"):
        is_folder(" ")
    with pytest.raises(CheckpointError, match=r"x{120}: cannot be a folder"):
        is_folder("x" * 5_000)


def test_an_adapter_is_known_by_its_config_where_no_model_lies(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    assert not is_adapter(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    assert is_adapter(tmp_path)
