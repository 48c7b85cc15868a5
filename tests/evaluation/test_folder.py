"""The folder of an evaluation: begun, gone on with, finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.errors import CheckpointError, OutputError
from vlmgraft.evaluation import folder
from vlmgraft.evaluation.ask import ask

SETTINGS: dict[str, Any] = {"model": "/models/vlm", "weights": "ab", "data": ["pope:/data/rows.jsonl"], "items": "cd"}
ASKING = {"seed": 0, "batch_size": 8, "device": "cpu"}


def begin(out: Path, **asking: Any) -> None:
    with folder.opened(out, SETTINGS, False, "vlm") as hidden:
        folder.start(hidden, SETTINGS | {"asking": ASKING | asking})
        (hidden / "records.jsonl").touch()
        raise KeyboardInterrupt


def go_on(out: Path, settings: dict[str, Any]) -> str:
    with folder.opened(out, settings, True, "vlm") as hidden:
        return hidden.name


def test_what_an_interruption_leaves_is_hidden_and_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        begin(out)
    assert not out.exists()
    with (
        pytest.raises(OutputError, match="unfinished evaluation; go on with --resume"),
        folder.opened(out, SETTINGS, False, "vlm"),
    ):
        pass
    assert go_on(out, SETTINGS | {"asking": ASKING | {"batch_size": 1, "device": "cuda"}}).startswith(".run")


@pytest.mark.parametrize("ended", [KeyboardInterrupt(), CheckpointError("no vector")])
def test_a_run_without_a_record_leaves_nothing(ended: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(ended)), folder.opened(tmp_path / "run", SETTINGS, False, "vlm") as hidden:
        folder.start(hidden, SETTINGS)
        raise ended
    assert not list(tmp_path.glob(".run.partial*"))
    hidden.mkdir()
    folder.start(hidden, SETTINGS | {"items": "other"})  # killed before its first record
    with folder.opened(tmp_path / "run", SETTINGS, False, "vlm"):
        pass


def test_a_visible_folder_without_a_summary_is_nothing_to_resume(tmp_path: Path) -> None:
    folder.start(tmp_path, SETTINGS)
    with pytest.raises(OutputError, match="holds no finished evaluation"):
        go_on(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("change", "resumed"),
    [
        ({"model": "../moved/vlm", "data": ["pope:/elsewhere/rows.jsonl"]}, True),
        ({"model": "/models/other"}, False),
        ({"model": "someone/vlm"}, False),
        ({"weights": "xy"}, False),
        ({"items": "xy"}, False),
        ({"data": ["pope:/data/others.jsonl"]}, False),
        ({"asking": ASKING | {"seed": 1}}, False),
    ],
)
def test_what_was_asked_must_be_the_same_but_may_lie_elsewhere(
    tmp_path: Path, change: dict[str, Any], resumed: bool
) -> None:
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "run")
    settings = SETTINGS | {"asking": ASKING} | change
    if resumed:
        assert go_on(tmp_path / "run", settings)
    else:
        with pytest.raises(OutputError, match="begun with other settings"):
            go_on(tmp_path / "run", settings)


def test_run_json_holds_no_absolute_path(tmp_path: Path) -> None:
    folder.start(tmp_path, SETTINGS | {"asking": {"steer": "/elsewhere/v.safetensors"}})
    settings = json.loads((tmp_path / "run.json").read_text())
    assert settings["model"] == "./vlm" and settings["data"] == ["pope:./rows.jsonl"]
    assert settings["asking"]["steer"] == "./v.safetensors"


def test_a_finished_folder_is_left_as_it_is(scripted: Any, sums: Any, adds: Any, tmp_path: Path) -> None:
    records = ask(scripted(adds), sums(5))
    folder.start(tmp_path, SETTINGS)
    first = folder.finish(tmp_path, records, 0, 0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"run.json", "records.jsonl", "summary.json", "summary.md", "receipt.json"}
    assert folder.stored_records(tmp_path) == records and folder.finish(tmp_path, records, 0, 0) == first
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
