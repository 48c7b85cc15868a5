"""Index, reader and writer against the safetensors library, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmgraft.checkpoint.index import INDEX, open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.checkpoint.shards import TensorSpec
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.errors import CheckpointError, OutputError

WEIGHTS = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(7), "c": torch.zeros(0, 2), "d": torch.arange(4)}
CODES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
SPECS = [TensorSpec(name, CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in WEIGHTS.items()]


@pytest.mark.parametrize("shard_size", [1, 40, 10**6])
def test_written_is_read_back_by_the_library_and_by_us(shard_size: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Writer(out, SPECS, shard_size) as writer:
        for name, tensor in WEIGHTS.items():
            writer.write(name, tensor)
    theirs = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    checkpoint = open_checkpoint(out)
    assert list(checkpoint.tensors) == list(WEIGHTS) and set(theirs) == set(WEIGHTS)
    with Reader(checkpoint) as reader:
        for name, tensor in WEIGHTS.items():
            assert torch.equal(reader.tensor(name), tensor) and torch.equal(theirs[name], tensor)
        piece = torch.empty(4)
        reader.read_into("a", 6, piece)
        assert torch.equal(piece, WEIGHTS["a"].flatten()[6:10].float())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_folder_is_removed_or_continued(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Writer(tmp_path / "out", SPECS, 40):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), Writer(tmp_path / "out", SPECS, 40, resume="k") as writer:
        writer.write("a", WEIGHTS["a"])
        writer.finish("a", {"norm": 1.0})
        raise RuntimeError
    with Writer(tmp_path / "out", SPECS, 40, resume="k") as writer:
        assert writer.done == {"a": {"norm": 1.0}}
        for name in ("b", "c", "d"):
            writer.write(name, WEIGHTS[name])
    with Reader(open_checkpoint(tmp_path / "out")) as reader:
        assert torch.equal(reader.tensor("a"), WEIGHTS["a"])
    with pytest.raises(OutputError, match="exists"):
        Writer(tmp_path / "out", SPECS, 40)


def _file(path: Path, header: object, data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "truncated"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "spans 4"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, "dtype 'F4'"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, r"shape \[-1\]"),
        ({"dtype": "F32", "shape": []}, "no proper"),
    ],
)
def test_lying_headers(entry: object, said: str, tmp_path: Path) -> None:
    _file(tmp_path / "model.safetensors", {"w": entry}, b"1234")
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path)


def test_overlap(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    _file(tmp_path / "model.safetensors", {"v": entry, "w": entry}, b"1234")
    with pytest.raises(CheckpointError, match="inside v"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "gone.safetensors"}, "missing"),
        ({"a": "../s.safetensors"}, "plain file names"),
        ({"a": "s.safetensors", "z": "s.safetensors"}, "says that z"),
    ],
)
def test_lying_indexes(weight_map: object, said: str, tmp_path: Path) -> None:
    save_file({"a": WEIGHTS["b"]}, tmp_path / "s.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path)


def test_pickles_are_refused_with_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        open_checkpoint(tmp_path)
