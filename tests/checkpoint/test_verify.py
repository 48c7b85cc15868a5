"""A merged folder is checked against its receipt: every flipped byte is found and named."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import vlmgraft as vg
from vlmgraft import cli
from vlmgraft.checkpoint.digests import BLOCK, RECEIPT, block_digests, joined, range_digest, seal
from vlmgraft.checkpoint.shards import TensorSpec
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.errors import CheckpointError
from vlmgraft.records import write_json


@pytest.fixture(scope="module")
def merged(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's merge in several shards."""
    out = tmp_path_factory.mktemp("verify") / "merged"
    models = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    recipe = {**models, "method": {"name": "task_arithmetic"}, "output": {"shard_size": "300KB"}}
    vg.merge(recipe, out)
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


@pytest.fixture
def copy(merged: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(merged, tmp_path / "copy"))


def owner(file: Path, place: int) -> str | None:
    """The tensor that byte `place` of a file belongs to, by the safetensors header read naively."""
    if file.suffix != ".safetensors":
        return None
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    ends = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return next((name for name, (begin, end) in ends.items() if begin <= place - start < end), None)


def test_an_untouched_folder_is_as_written(merged: Path) -> None:
    found = vg.verify(merged)
    assert found.faults == () and found.unlisted == ()
    beside = [path for path in merged.iterdir() if path.name != RECEIPT]
    assert found.files == len(beside) and found.nbytes == sum(path.stat().st_size for path in beside)
    with_library = 0
    for file in merged.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            with_library += len(opened.keys())
    assert found.tensors == with_library


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_found_and_named(merged: Path, data: st.DataObject) -> None:
    file = merged / data.draw(st.sampled_from(sorted(path.name for path in merged.iterdir())))
    before = file.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    tensor, mask = owner(file, place), data.draw(st.integers(1, 255))
    with file.open("r+b") as handle:
        handle.seek(place)
        handle.write(bytes([before[place] ^ mask]))
    try:
        found = vg.verify(merged)
    finally:
        file.write_bytes(before)
    assert file.name in {fault.file for fault in found.faults}
    if tensor is not None:
        assert {(fault.file, fault.tensor) for fault in found.faults} == {(file.name, tensor)}


def test_every_byte_of_the_receipt_and_of_a_header_counts(copy: Path) -> None:
    shard = min(copy.glob("*.safetensors"))
    length = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    receipt = len((copy / RECEIPT).read_bytes())
    for file, places in ((shard, range(0, length, 37)), (copy / RECEIPT, range(0, receipt, receipt // 40))):
        before = file.read_bytes()
        for place in places:
            file.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
            assert file.name in {fault.file for fault in vg.verify(copy).faults}, place
        file.write_bytes(before)
    assert not vg.verify(copy).faults


def test_missing_cut_grown_swapped_and_new_files(copy: Path) -> None:
    first, second, third, *_ = sorted(copy.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    (copy / "config.json").open("a").write(" ")
    (copy / "adapter_model.safetensors").write_bytes(b"")
    found = vg.verify(copy)
    files = {fault.file for fault in found.faults if fault.tensor is None}
    assert files == {first.name, second.name, "config.json"}
    assert found.unlisted == ("adapter_model.safetensors",)
    named = {fault.tensor for fault in found.faults if fault.file == first.name and fault.tensor}
    assert named == set(next(row["tensors"] for row in rows(copy, "files") if row["name"] == first.name))
    shutil.copyfile(third, second)
    assert second.name in {fault.file for fault in vg.verify(copy).faults}


def test_a_tensor_saved_in_another_dtype_is_named(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    shard = min(copy.glob("*.safetensors"))
    weights = load_file(shard)
    name = min(weights)
    save_file({**weights, name: weights[name].double()}, shard, {"format": "pt"})
    faults = {fault.tensor: fault.what for fault in vg.verify(copy).faults}
    assert faults[name].startswith("is F64") and "its header" in faults[None]


def rows(folder: Path, key: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / RECEIPT).read_text())[key]
    return found


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "a//b", "a/../b", "./a"])
def test_a_receipt_does_not_lead_out_of_its_folder(name: str, copy: Path) -> None:
    receipt = json.loads((copy / RECEIPT).read_text())
    receipt["files"][0]["name"] = name
    receipt["digest"] = seal(receipt)
    write_json(copy / RECEIPT, receipt)
    with pytest.raises(CheckpointError, match="only files of its own folder"):
        vg.verify(copy)


@pytest.mark.parametrize("receipt", [{"tensors": []}, [], {"files": [1], "tensors": []}, {"files": {}, "tensors": 3}])
def test_what_is_no_receipt_of_ours(receipt: object, tmp_path: Path) -> None:
    if isinstance(receipt, dict) and "files" in receipt:
        receipt["digest"] = ""
        receipt["digest"] = seal(receipt)
    write_json(tmp_path / RECEIPT, receipt)
    with pytest.raises(CheckpointError, match="make it again"):
        vg.verify(tmp_path)
    for missing in (tmp_path / "gone", Path(tmp_path.parent)):
        with pytest.raises(CheckpointError, match="merge --out"):
            vg.verify(missing)


def test_the_command(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vlmgraft", "verify", str(copy), "--quiet", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().out

    code, said = run()
    assert code == 0 and said.endswith("bytes: as written\n")
    shard = max(copy.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    place = next(place for place in range(8 + int.from_bytes(raw[:8], "little"), len(raw)) if owner(shard, place))
    raw[place] ^= 128
    shard.write_bytes(raw)
    code, said = run()
    assert code == 1 and f"{shard}: {owner(shard, place)}: its bytes" in said and "1 faults" in said
    code, said = run("--json")
    assert code == 1 and [fault["file"] for fault in json.loads(said)["faults"]] == [shard.name]
    (copy / RECEIPT).unlink()
    assert run()[0] == 2


@settings(max_examples=30, deadline=None)
@given(size=st.integers(0, 3 * BLOCK), begin=st.integers(0, 9), seed=st.integers(0, 9))
def test_the_digest_is_its_formula_however_it_is_read(
    size: int, begin: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(256, (size,), generator=generator, dtype=torch.uint8).numpy().tobytes()
    path = tmp_path_factory.getbasetemp() / "digest"
    path.write_bytes(b"x" * begin + data + b"after")
    naive = b"".join(xxhash.xxh3_128(data[at : at + BLOCK]).digest() for at in range(0, size, BLOCK))
    assert range_digest(path, begin, size) == xxhash.xxh3_128(naive).hexdigest() == joined(block_digests(data))


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
