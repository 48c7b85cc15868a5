"""A merged folder is checked against its receipt: every flipped byte is found and named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from safetensors import safe_open

import vlmgraft as vg
from tests.checkpoint.merged_shards import merge_in_shards, owner
from vlmgraft.checkpoint.digests import RECEIPT, block_digests, joined, seal
from vlmgraft.errors import CheckpointError, DamagedError
from vlmgraft.storage.jsonl import write_json


@pytest.fixture(scope="module")
def merged(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge_in_shards(trio, tmp_path_factory.mktemp("verify") / "merged")


@pytest.fixture
def copy(merged: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(merged, tmp_path / "copy"))


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
    assert not found.unchanged
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


@pytest.mark.parametrize("receipt", [{"tensors": []}, {"files": [1], "tensors": []}, {"files": {}, "tensors": 3}])
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


def crafted(copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A receipt that somebody changed and sealed again."""
    receipt = json.loads((copy / RECEIPT).read_text())
    change(receipt)
    receipt["digest"] = seal(receipt)
    write_json(copy / RECEIPT, receipt)


def hide(receipt: dict[str, Any]) -> None:
    """Take the last tensor of the first file out of the receipt: nothing would cover its bytes."""
    file = next(row for row in receipt["files"] if row["tensors"])
    name = file["tensors"].pop()
    receipt["tensors"] = [row for row in receipt["tensors"] if row["name"] != name]


def hide_all(receipt: dict[str, Any]) -> None:
    names = next(row for row in receipt["files"] if row["tensors"])["tensors"]
    receipt["tensors"] = [row for row in receipt["tensors"] if row["name"] not in names]
    names.clear()


def cover_less(receipt: dict[str, Any]) -> None:
    file = next(row for row in receipt["files"] if row["name"] == "config.json")
    file.update(digested=0, digest=joined([]))


@pytest.mark.parametrize("change", [hide, hide_all, cover_less])
def test_a_receipt_that_leaves_bytes_out_covers_nothing(change: Callable[[dict[str, Any]], None], copy: Path) -> None:
    crafted(copy, change)
    assert vg.verify(copy).faults


@pytest.mark.parametrize(
    "change",
    [
        lambda receipt: receipt["files"].append(receipt["files"][0]),
        lambda receipt: receipt["files"][0]["tensors"].append(receipt["files"][0]["tensors"][0]),
        lambda receipt: receipt["tensors"].append(receipt["tensors"][0]),
        lambda receipt: receipt["tensors"].append({**receipt["tensors"][0], "name": "absent"}),
        lambda receipt: receipt["files"][0].update(size=True),
        lambda receipt: receipt["files"][0].update(digested=-1),
        lambda receipt: receipt["files"][0].update(name=["a"]),
        lambda receipt: receipt["files"][0].update(tensors=[{}]),
        lambda receipt: receipt["tensors"][0].update(shape="1"),
        lambda receipt: receipt["files"][0].update(name=RECEIPT),
        lambda receipt: receipt.update(files={}),
        lambda receipt: receipt.update(tensors=None),
    ],
)
def test_rows_that_no_command_writes(change: Callable[[dict[str, Any]], object], copy: Path) -> None:
    crafted(copy, change)
    with pytest.raises(CheckpointError, match=r"receipt\.json: .*make it again"):
        vg.verify(copy)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_the_receipt_has_digests_of_what_was_read(method: str, trio: Path, tmp_path: Path) -> None:
    models = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    models |= {"vlm_base": str(trio / "base")} if method == "ties" else {}
    vg.merge({**models, "method": {"name": method}, "modules": ["attention"]}, tmp_path / "out")
    sources = json.loads((tmp_path / "out" / RECEIPT).read_text())["sources"]
    assert set(sources) == set(models)
    for key, read in sources.items():
        raw = (Path(models[key]) / "model.safetensors").read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        assert set(read) == {
            name for name in header if key == "vlm" or ("_proj.weight" in name and "self_attn" in name)
        }
        for name, digest in read.items():
            begin, end = header[name]["data_offsets"]
            assert digest == joined(block_digests(raw[start + begin : start + end]))
    assert vg.verify(tmp_path / "out", sources=models).unchanged


@pytest.mark.parametrize("sources", [[], {"donor": []}, {"donor": {"w": 3}}, 7])
def test_sources_that_no_command_writes(sources: object, copy: Path, trio: Path) -> None:
    crafted(copy, lambda receipt: receipt.update(sources=sources))
    with pytest.raises(DamagedError, match=r"its sources are no digests"):
        vg.verify(copy, sources={"donor": trio / "donor"})


def test_links_are_not_followed_and_nothing_is_waited_for(copy: Path, tmp_path: Path) -> None:
    """The target has the right bytes: whoever loads the folder elsewhere finds others, or none."""
    shard, config = min(copy.glob("*.safetensors")), copy / "config.json"
    (tmp_path / "elsewhere").mkdir()
    shutil.move(shard, tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere" / shard.name)
    config.unlink()
    os.mkfifo(config)
    os.mkfifo(copy / "extra")
    (copy / "folder").symlink_to(tmp_path / "elsewhere")
    (copy / "dead\x1b[2J").symlink_to("nowhere")
    found = vg.verify(copy)
    kinds = {fault.file: fault.what for fault in found.faults if fault.tensor is None}
    assert kinds == {shard.name: "is a link, not a file", "config.json": "is a FIFO, not a file"}
    assert found.unlisted == ("dead\x1b[2J", "extra", "folder")
    shutil.move(copy / RECEIPT, tmp_path)
    (copy / RECEIPT).symlink_to(tmp_path / RECEIPT)
    with pytest.raises(CheckpointError, match="is a link, not a file"):
        vg.verify(copy)


def test_a_folder_in_the_place_of_a_link_does_not_lead_out(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    row = {"name": "inner/file", "size": 1, "digested": 1, "digest": joined(block_digests(b"x")), "tensors": []}
    crafted(copy, lambda receipt: receipt["files"].append(row))
    (copy / "inner").symlink_to(tmp_path / "elsewhere")
    found = vg.verify(copy)
    assert [str(fault) for fault in found.faults] == ["inner/file: is missing"] and found.unlisted == ("inner",)


def test_an_enormous_receipt_is_not_read(copy: Path) -> None:
    with (copy / RECEIPT).open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CheckpointError, match="100,000,000 bytes"):
        vg.verify(copy)


def test_a_folder_without_a_receipt_is_not_walked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "walk", lambda *_: pytest.fail("walks"))
    for folder in (tmp_path, Path("/")):
        with pytest.raises(CheckpointError, match=r"has no receipt\.json"):
            vg.verify(folder)
