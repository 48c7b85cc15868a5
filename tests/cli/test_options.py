"""Options that commands share: every command has them, and what they set is set for its time."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_inputs import WEIGHTS
from typer.main import get_command

from tests.recipe_place import Place
from vlmgraft import cli


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def commands() -> dict[str, Any]:
    """Every command by its words."""
    found: dict[str, Any] = {}
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {key}": value for key, value in inner.items()} if inner else {name: command}
    return found


LOADS_MODELS = {
    "merge", "decompose", "gates", "front", "evaluate", "compare", "drift", "knockout", "ranks", "sweep", "choose",
    "attention", "steer", "tune", "play", "inspect",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_keeps_the_conventions(name: str, vlmgraft: Any) -> None:
    options = options_of(commands()[name])
    assert {"--json", "--quiet", "-q", "--verbose", "-v"} <= options
    assert ("--out" in options) == ("-o" in options)
    assert ({"--device", "--dtype"} <= options) == (name in LOADS_MODELS)
    short = vlmgraft(*name.split(), "-h")
    assert short.code == 0 and "Exit codes: 0 done" in short.out
    assert short.out == vlmgraft(*name.split(), "--help").out


def test_force_replaces_what_vlmgraft_wrote_and_nothing_else(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    recipe = place.write()
    assert vlmgraft("merge", recipe, "-o", place.out, "-q").code == 0
    before = (place.out / WEIGHTS).read_bytes()
    assert vlmgraft("merge", recipe, "-o", place.out, "-q").code == 2
    failed = vlmgraft("merge", recipe, "-o", place.out, "-q", "--force", "--set", "vlm=absent/absent")
    assert failed.code == 2 and (place.out / WEIGHTS).read_bytes() == before, "what was there is put back"
    assert vlmgraft("merge", recipe, "-o", place.out, "-q", "--force", "--set", "method.scale=0").code == 0
    assert (place.out / WEIGHTS).read_bytes() == (trio / "vlm" / WEIGHTS).read_bytes() != before
    assert [path.name for path in place.out.parent.iterdir()] == ["merged"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    refused = vlmgraft("merge", recipe, "-o", tmp_path / "mine", "-q", "--force")
    assert refused.code == 2 and "this is none" in refused.err and (tmp_path / "mine" / "thesis.tex").exists()
    assert "give one of them" in vlmgraft("merge", recipe, "-o", place.out, "--force", "--resume").err
    (tmp_path / "front").mkdir()
    (tmp_path / "front" / "front.jsonl").touch()
    options = ("-o", tmp_path / "front", "--factors", tmp_path, "--budgets", "0.1", "--force")
    assert "unknown key" in vlmgraft("front", recipe, *options).err, "a front is replaced, were the recipe right"


def test_json_is_one_object_and_everything_else_is_on_standard_error(trio: Path, tmp_path: Path, vlmgraft: Any) -> None:
    place = Place(tmp_path, trio, "task_arithmetic")
    for arguments in (
        ("lab", "path"), ("inspect", place.write()), ("merge", place.write(), "-o", place.out), ("verify", place.out),
    ):  # fmt: skip
        assert isinstance(json.loads(vlmgraft(*arguments, "--json").out), dict), arguments


def test_device_and_token_reach_their_libraries_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmgraft.cli.options import environment
    from vlmgraft.errors import InputError
    from vlmgraft.hf.placement import default_device, default_dtype

    monkeypatch.delenv("VLMGRAFT_DEVICE", raising=False)
    with environment(VLMGRAFT_DEVICE="cpu", VLMGRAFT_DTYPE="bfloat16", HF_TOKEN=None):
        assert default_device() == torch.device("cpu") and default_dtype(default_device()) == torch.bfloat16
    assert "VLMGRAFT_DEVICE" not in os.environ
    with environment(VLMGRAFT_DEVICE="nonsense"), pytest.raises(InputError, match="--device nonsense"):
        default_device()


@pytest.mark.parametrize("value", ["\0", "\ud800"], ids=["NUL", "half a pair"])
def test_what_no_environment_holds_is_refused(
    vlmgraft: Any, trio: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """As a device, which goes into the environment; it is then as it was."""
    monkeypatch.delenv("VLMGRAFT_DEVICE", raising=False)
    ran = vlmgraft("inspect", "--vlm", str(trio / "vlm"), "--donor", str(trio / "donor"), f"--device={value}")
    assert ran.code == 2 and "no value of an option" in ran.err
    assert "VLMGRAFT_DEVICE" not in os.environ


@pytest.mark.parametrize("name", ["decompose", "front", "gates", "tune"])
def test_under_torchrun_the_first_process_alone_shows_the_result(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"vlmgraft.cli.{name}")
    cls = next(value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__)
    shown = {}
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        for as_json in (True, False):
            options = {"recipe": Path(), "out": Path(), "factors": Path(), "budgets": "1", "as_json": as_json}
            chosen = cls(**{key: value for key, value in options.items() if key in cls.__dataclass_fields__})
            chosen.show({"steps": 3}, "3 steps")
        shown[rank] = capsys.readouterr().out
    assert shown == {"0": '{"steps": 3}\n3 steps\n', "1": ""}
