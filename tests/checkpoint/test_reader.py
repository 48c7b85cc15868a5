"""Tensors and pieces of them, as the safetensors library reads them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.errors import CheckpointError


def test_pieces_are_cast_and_bounded(tmp_path: Path) -> None:
    weights = {"w": torch.randn(4, 5).bfloat16(), "empty": torch.zeros(0)}
    save_file(weights, tmp_path / "model.safetensors")
    with Reader(open_checkpoint(tmp_path)) as reader:
        assert torch.equal(reader.tensor("w"), weights["w"]) and reader.tensor("empty").shape == (0,)
        piece = torch.empty(7)
        reader.read_into("w", 6, piece)
        assert torch.equal(piece, weights["w"].flatten()[6:13].float())
        with pytest.raises(ValueError, match="14 to 21 of 20"):
            reader.read_into("w", 14, piece)
        with pytest.raises(CheckpointError, match="has no tensor v"):
            reader.tensor("v")


def test_a_file_that_gets_shorter_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(100)}, file)
    checkpoint = open_checkpoint(tmp_path)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends inside w"), Reader(checkpoint) as reader:
        reader.tensor("w")


def test_a_file_that_changes_meanwhile_is_named(tmp_path: Path) -> None:
    """Of the same size: only its time tells."""
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(100)}, file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was read"):  # noqa: SIM117
        with Reader(open_checkpoint(tmp_path)) as reader:
            reader.tensor("w")
            save_file({"w": torch.ones(100)}, file)
            os.utime(file, ns=(1, 1))
    with pytest.raises(KeyboardInterrupt), Reader(open_checkpoint(tmp_path)):
        file.unlink()
        raise KeyboardInterrupt


def digest_by_hand(data: bytes) -> str:
    """XXH3-128 of the XXH3-128s of blocks of 256 KiB, as docs/reference/files.md says."""
    blocks = [xxhash.xxh3_128_digest(data[at : at + 2**18]) for at in range(0, len(data), 2**18)]
    return xxhash.xxh3_128_hexdigest(b"".join(blocks))


def test_what_was_read_whole_is_digested_in_any_order(tmp_path: Path) -> None:
    weights = {"w": torch.randn(2**17 + 3), "half": torch.randn(2**17), "empty": torch.zeros(0), "v": torch.randn(5)}
    save_file(weights, tmp_path / "model.safetensors")
    with Reader(open_checkpoint(tmp_path)) as reader:
        assert reader.digests() == reader.digests(["w"]) == {}
        for start, count in ((2**16, 2**16 + 3), (100, 7), (0, 2**16)):
            assert reader.digests(["w"]) == {}
            reader.read_into("w", start, torch.empty(count))
        reader.read_into("half", 0, torch.empty(2**16))
        reader.tensor("v")
        by_hand = {name: digest_by_hand(weights[name].numpy().tobytes()) for name in ("v", "w")}
        assert reader.digests() == by_hand


def test_a_block_that_reads_differently_the_second_time_is_named(tmp_path: Path) -> None:
    """Whoever writes there may set size and time back; methods that read twice see it all the same."""
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(10)}, file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: w changed while it was read"):  # noqa: SIM117
        with Reader(open_checkpoint(tmp_path)) as reader:
            reader.tensor("w")
            stamp = file.stat().st_mtime_ns
            file.write_bytes(file.read_bytes()[:-1] + b"\1")
            os.utime(file, ns=(stamp, stamp))
            reader.tensor("w")
