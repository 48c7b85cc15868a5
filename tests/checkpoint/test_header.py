"""Headers that lie are refused with the file, the field and the remedy, in little memory."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from vlmgraft.checkpoint.header import TensorSpec, count_shards, header_of, plan_shards
from vlmgraft.checkpoint.index import open_checkpoint
from vlmgraft.errors import CheckpointError
from vlmgraft.storage.limits import MAX_HEADER

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def entry(**changes: Any) -> dict[str, Any]:
    return {**F32, **changes}


def write(folder: Path, header: object, data: bytes = b"1234", name: str = "model.safetensors") -> Path:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder / name


def peak() -> int:
    """Bytes; the most this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


LIES = {
    "past the end": ({"w": entry(shape=[2], data_offsets=[0, 8])}, "truncated"),
    "far past the end": ({"w": entry(dtype="U8", shape=[1 << 62], data_offsets=[0, 1 << 62])}, "truncated"),
    "begins past the end": ({"w": entry(data_offsets=[1 << 40, (1 << 40) + 4])}, "truncated"),
    "overlap": ({"v": F32, "w": F32}, "inside v"),
    "negative begin": ({"w": entry(data_offsets=[-4, 0])}, "offsets"),
    "backwards": ({"w": entry(data_offsets=[4, 0])}, "spans -4"),
    "negative shape": ({"w": entry(shape=[-1, -1])}, "shape"),
    "float shape": ({"w": entry(shape=[1.0])}, "shape"),
    "boolean shape": ({"w": entry(shape=[True])}, "shape"),
    "text shape": ({"w": entry(shape="1")}, "shape"),
    "float offsets": ({"w": entry(data_offsets=[0.0, 4.0])}, "offsets"),
    "three offsets": ({"w": entry(data_offsets=[0, 4, 4])}, "data_offsets"),
    "shape overflow": ({"w": entry(shape=[1 << 40] * 4)}, "spans 4"),
    "shape that wraps to 4 bytes": ({"w": entry(shape=[(1 << 62) + 1])}, "spans 4"),
    "huge rank": ({"w": entry(shape=[1 << 60] * 100_000)}, "more than a file"),
    "unknown dtype": ({"w": entry(dtype="F4")}, "dtype 'F4'"),
    "dtype of another type": ({"w": entry(dtype=["F32"])}, "dtype"),
    "entry of another type": ({"w": 3}, "no proper"),
    "hole at the end": ({"w": entry(shape=[0], data_offsets=[0, 0])}, "after the last tensor"),
    "twice": ('{"w": %s, "w": %s}' % (json.dumps(F32), json.dumps(F32)), "twice"),  # noqa: UP031
    "deep": ("[" * 100_000, "JSON"),
    "no mapping": ("[]", "mapping"),
    "digits": ('{"w": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}}' % ("9" * 5000), "JSON"),
    "control characters": ({"w\x1b[2Jx": F32}, "name"),
    "line break": ({"w\nERROR": F32}, "name"),
    "lone surrogate": ({"w\ud800": F32}, "name"),
    "no name": ({"": F32}, "name"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie: str, tmp_path: Path) -> None:
    header, said = LIES[lie]
    file = write(tmp_path, header)
    before = peak()
    with pytest.raises(CheckpointError, match=said) as refused:
        open_checkpoint(tmp_path)
    message = str(refused.value)
    assert message.startswith(str(file)) and refused.value.exit_code == 2
    assert len(message) < 1500 and "\x1b" not in message and "\n" not in message
    assert peak() - before < 100_000_000


@pytest.mark.parametrize("claimed", [MAX_HEADER, MAX_HEADER + 1, 1 << 63, (1 << 64) - 1])
def test_a_header_larger_than_its_file_or_than_the_limit_is_not_read(claimed: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as handle:
        handle.write(claimed.to_bytes(8, "little"))
        handle.truncate(MAX_HEADER if claimed == MAX_HEADER else 2 * MAX_HEADER)  # sparse
    before = peak()
    with pytest.raises(CheckpointError, match="header"):
        open_checkpoint(tmp_path)
    assert peak() - before < 10_000_000


SPECS = [TensorSpec(name, "F32", (size,)) for name, size in zip("abcd", (2, 2, 5, 0), strict=True)]


@pytest.mark.parametrize(
    ("size", "groups"),
    [(1, ["a", "b", "c", "d"]), (16, ["ab", "c", "d"]), (20, ["ab", "cd"]), (35, ["ab", "cd"]), (36, ["abcd"])],
)
def test_files_are_filled_in_order(size: int, groups: list[str]) -> None:
    shards = plan_shards(SPECS, size)
    assert ["".join(tensor.name for tensor in shard.tensors) for shard in shards] == groups
    assert count_shards([spec.nbytes for spec in SPECS], size) == len(groups)
    first = f"model-00001-of-0000{len(groups)}.safetensors"
    assert shards[0].name == ("model.safetensors" if len(groups) == 1 else first)


def test_the_library_reads_the_header(tmp_path: Path) -> None:
    header = header_of(SPECS, {"format": "pt"})
    assert len(header) % 8 == 0
    (tmp_path / "file").write_bytes(header + bytes(36))
    with safe_open(tmp_path / "file", "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes == {"a": [2], "b": [2], "c": [5], "d": [0]}
