"""What is written is read back by the safetensors library; interruptions; digests of pieces in any order."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file

from vlmgraft.checkpoint.digests import BLOCK, block_digests, joined
from vlmgraft.checkpoint.handles import TORCH_DTYPES
from vlmgraft.checkpoint.header import TensorSpec, read_header
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.checkpoint.reader import Reader
from vlmgraft.checkpoint.writer import Writer, save_tensors
from vlmgraft.errors import OutputError

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


def test_the_writer_digests_blocks_in_any_order_and_refuses_gaps(tmp_path: Path) -> None:
    data = torch.randint(256, (3 * BLOCK + 5,), dtype=torch.uint8)
    with Writer(tmp_path / "out", [TensorSpec(name, "U8", (len(data),)) for name in "ab"], 10**9) as writer:
        for start in (2 * BLOCK, 0):
            writer.write_at("a", start, data[start : start + 2 * BLOCK])
        assert writer.digest("a") == joined(block_digests(data.numpy().tobytes()))
        writer.write_at("b", 0, data[:100])
        writer.write_at("b", 100, data[100:])
        with pytest.raises(ValueError, match="whole blocks"):
            writer.digest("b")


DTYPES = sorted(
    set(TORCH_DTYPES.values()) & {torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool}, key=str
)


@given(
    shapes=st.dictionaries(
        st.text("aZ0._ßµ", min_size=1, max_size=5),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    ),
    notes=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3),
)
def test_the_library_reads_what_we_save(
    shapes: dict[str, tuple[torch.dtype, list[int]]], notes: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "ours.safetensors"
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in shapes.items()}
    save_tensors(tensors, path, notes)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == one.dtype and found[name].equal(one) for name, one in tensors.items())
    for name, info in read_header(path).items():
        assert info.begin % tensors[name].element_size() == 0, "aligned"


def test_finished_tensors_are_flushed_while_others_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr("vlmgraft.checkpoint.writer.FLUSH", 40)
    monkeypatch.setattr("os.fsync", lambda handle: flushed.append(handle))
    with Writer(tmp_path / "out", SPECS, 10**6) as writer:
        for name, tensor in WEIGHTS.items():
            writer.write(name, tensor)
            writer.finish(name, {})
        writer._flusher.shutdown()
        assert len(flushed) == 1  # after 30 + 28 bytes; 32 more are below the bound
    assert len(flushed) > 1


def test_shards_below_the_bound_are_flushed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr("vlmgraft.checkpoint.writer.FLUSH", 40)
    monkeypatch.setattr("os.fsync", lambda handle: flushed.append(handle))
    with Writer(tmp_path / "out", SPECS, 1) as writer:  # a shard for each tensor
        for name, tensor in WEIGHTS.items():
            writer.write(name, tensor)
            writer.finish(name, {})
        writer._flusher.shutdown()
        assert len(flushed) == 2


@pytest.mark.parametrize("stopped", [False, True])
def test_a_flush_that_fails_publishes_nothing_and_nothing_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """The system tells of a write that failed once; stopped: somebody stopped the work before it was heard of."""

    heard = threading.Event()

    def fails(handle: int) -> None:
        heard.wait(60)
        raise OSError(errno.EIO, "Input/output error")

    def write() -> None:
        with Writer(tmp_path / "out", SPECS, 10**6, resume="key") as writer:
            patch.setattr("os.fsync", fails)
            for name, tensor in WEIGHTS.items():
                writer.write(name, tensor)
                writer.finish(name, {})
                heard.set()
                if stopped:
                    writer._flusher.shutdown()
                    raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vlmgraft.checkpoint.writer.FLUSH", 1)
        if stopped:
            with pytest.raises(KeyboardInterrupt):
                write()
        else:
            with pytest.raises(OutputError, match=r"model\.safetensors.*Input/output"):
                write()
    assert not (tmp_path / "out").exists()
    with Writer(tmp_path / "out", SPECS, 10**6, resume="key") as writer:
        assert not writer.done
        for name, tensor in WEIGHTS.items():
            writer.write(name, tensor)
            writer.finish(name, {})
