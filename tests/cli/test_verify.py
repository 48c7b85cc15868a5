"""The command `verify`: exit codes, faults by name, sources that changed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.merged_shards import merge_in_shards, owner
from vlmgraft import cli
from vlmgraft.checkpoint.digests import RECEIPT


@pytest.fixture(scope="module")
def merged(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge_in_shards(trio, tmp_path_factory.mktemp("verify") / "merged")


@pytest.fixture
def copy(merged: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(merged, tmp_path / "copy"))


def test_a_source_that_changed_since_is_named(copy: Path, trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    donor = Path(shutil.copytree(trio / "donor", tmp_path / "donor"))
    arguments = ("verify", copy, "--source", f"donor={donor}", "--source", f"vlm={trio / 'vlm'}")
    assert vlmgraft(*arguments).code == 0
    file = donor / "model.safetensors"
    read = json.loads((copy / RECEIPT).read_text())["sources"]["donor"]
    raw = bytearray(file.read_bytes())
    place = next(at for at in range(len(raw) - 1, 0, -1) if owner(file, at) in read)
    raw[place] ^= 1
    file.write_bytes(raw)
    ran = vlmgraft(*arguments)
    assert ran.code == 1 and f"{file}: {owner(file, place)}: its bytes are not what was read" in ran.out, ran.out
    assert vlmgraft("verify", copy).code == 0
    for text, why in (("teacher=x", "names no source 'teacher'"), ("donor", "such as donor=FOLDER")):
        ran = vlmgraft("verify", copy, "--source", text)
        assert ran.code == 2 and why in ran.err, ran.err


def test_names_are_escaped_and_extra_files_named(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "a\x1b[2J\nfrism: unchanged since its receipt").touch()
    monkeypatch.setattr(sys, "argv", ["vlmgraft", "verify", str(copy), "--quiet"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().out
    assert stop.value.code == 1 and "\x1b" not in said and said.endswith(": 1 differences\n")
    assert "a\\x1b[2J frism: unchanged since its receipt: is not in the receipt" in said.splitlines()[0]


def test_the_command(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vlmgraft", "verify", str(copy), "--quiet", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().out

    code, said = run()
    assert code == 0 and said.endswith("bytes: unchanged since its receipt\n")
    shard = max(copy.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    place = next(place for place in range(8 + int.from_bytes(raw[:8], "little"), len(raw)) if owner(shard, place))
    raw[place] ^= 128
    shard.write_bytes(raw)
    code, said = run()
    assert code == 1 and f"{shard}: {owner(shard, place)}: its bytes" in said and said.endswith("1 differences\n")
    code, said = run("--json")
    assert code == 1 and [fault["file"] for fault in json.loads(said)["faults"]] == [shard.name]
    (copy / RECEIPT).unlink()
    assert run()[0] == 2
