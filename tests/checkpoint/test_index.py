"""An index leads to files of its own folder only; pickles and code of a checkpoint are left alone."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlmgraft.checkpoint.files import INDEX
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import CheckpointError


@pytest.mark.parametrize(
    "shard", ["../s.safetensors", "/etc/passwd", "a/../s.safetensors", "..", "", "s\\t", "s\x00", 3]
)
def test_an_index_does_not_lead_out_of_its_folder(shard: object, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    for name in ("pytorch_model.bin", "model.safetensors", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)
        assert not (tmp_path / "ran").exists()
        (tmp_path / name).unlink()


def test_remote_code_is_not_run_by_opening(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert open_checkpoint(tmp_path).config["model_type"] == "evil"
    assert not (tmp_path / "ran").exists()


def test_tensors_come_in_the_order_of_the_shards_and_of_their_bytes(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(2), "a": torch.zeros(3)}, tmp_path / "s1.safetensors")
    save_file({"c": torch.zeros(1)}, tmp_path / "s2.safetensors")
    shards = {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards}))
    checkpoint = open_checkpoint(tmp_path)
    begins = {name: (info.file.name, info.begin) for name, info in checkpoint.tensors.items()}
    assert list(begins) == sorted(begins, key=lambda name: begins[name]) and checkpoint.nbytes == 24
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards | {"z": "s1.safetensors"}}))
    with pytest.raises(CheckpointError, match="says that z is in s1"):
        open_checkpoint(tmp_path)


def test_weights_left_empty_by_zero_3_are_named(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.ones(0)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is empty.*zero_to_fp32"):
        open_checkpoint(tmp_path)
