"""Only regular files are opened, and only JSON of bounded size is parsed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlmgraft.checkpoint.files import inside, load_json, open_regular, parse_json, public_name, refuse_special
from vlmgraft.errors import CheckpointError


def test_special_files_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, kind in (("fifo", "a FIFO"), ("zero", "a device"), ("folder", "a folder")):
        with pytest.raises(CheckpointError, match=f"{name}: is {kind}"):
            open_regular(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"not a file; remove it"):
        refuse_special(tmp_path)


def test_json_is_bounded_and_strict(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": Infinity}')
    assert load_json(file) == {"a": float("inf")}
    with pytest.raises(CheckpointError, match="Infinity is no JSON"):
        load_json(file, strict=True)
    with pytest.raises(CheckpointError, match="more than 5 bytes"):
        load_json(file, 5)
    with pytest.raises(CheckpointError, match="'a' twice"):
        parse_json(b'{"a": 1, "a": 2}', "text")


def test_links_within_a_folder_or_its_repository_are_inside(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "x").touch()
    (tmp_path / "secret").touch()
    (snapshot / "good").symlink_to("../../blobs/x")
    (snapshot / "bad").symlink_to("../../secret")
    assert inside(snapshot / "good", snapshot) and not inside(snapshot / "bad", snapshot)
    assert not inside(tmp_path / "secret", blobs)


def test_a_snapshot_is_known_by_its_repository(tmp_path: Path) -> None:
    assert public_name(tmp_path / "my-model") == "my-model"
    snapshot = tmp_path / "models--unsloth--Qwen2.5-7B--Instruct" / "snapshots" / ("a" * 40)
    assert public_name(snapshot) == "unsloth/Qwen2.5-7B--Instruct"
