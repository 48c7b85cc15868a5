"""Errors say whose they are: the input's in one line, by the first cause; our own are tracebacks to be reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import Place, evaluate, merge

from vlmgraft import cli
from vlmgraft.errors import CheckpointError

Run = Callable[..., Any]


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("shapes"), OSError("odd"), AssertionError()])
def test_a_mistake_of_ours_is_no_one_liner(
    error: Exception,
    trio: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("vlmgraft.pipeline.merge", broken)
    monkeypatch.setattr(sys, "argv", ["vlmgraft", *map(str, merge(Place(tmp_path, trio)))])
    with pytest.raises(type(error)):
        cli.main()
    assert "this is a mistake of vlmgraft" in capsys.readouterr().err


def test_a_value_that_transformers_refuses_is_told(trio: Path, tmp_path: Path, vlmgraft: Run) -> None:
    place = Place(tmp_path, trio)
    file = place.own("vlm", weights=True) / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["hidden_size"] = "wide"
    file.write_text(json.dumps(config))
    ran = vlmgraft(*evaluate(place, place.questions({"question": "q", "answer": "a"})))
    assert ran.code == 2 and "hidden_size" in ran.err and "Traceback" not in ran.err, ran.err


def test_the_first_cause_is_told(trio: Path, tmp_path: Path, vlmgraft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no VLM is tried as a text model; that it is none of those either helps nobody."""

    def refuse(reason: str) -> Callable[..., None]:
        def load(*_: Any) -> None:
            raise CheckpointError(reason)

        return load

    monkeypatch.setattr("vlmgraft.hf.models.load_vlm", refuse("the first"))
    monkeypatch.setattr("vlmgraft.hf.models.load_text_model", refuse("the second"))
    place = Place(tmp_path, trio)
    ran = vlmgraft(*evaluate(place, place.questions({"question": "q", "answer": "a"})))
    assert ran.code == 2 and ran.err.splitlines()[-1] == "vlmgraft: the first"


@pytest.mark.parametrize("words", [["merge", "--schema"], ["--help"], ["merge", "RECIPE", "--dry-run"]])
def test_standard_output_that_is_full(words: list[str], trio: Path, tmp_path: Path) -> None:
    recipe = str(Place(tmp_path, trio).recipe())
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "vlmgraft", *(recipe if word == "RECIPE" else word for word in words)]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ, check=False)
    assert ran.returncode == 1, ran.stderr
    assert "standard output: cannot be written (No space left" in ran.stderr and "Traceback" not in ran.stderr


def test_inputs_that_change_while_they_are_merged(
    trio: Path, tmp_path: Path, vlmgraft: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of one version and half of another would give a folder that verifies."""
    from vlmgraft.checkpoint.writer import Writer

    place = Place(tmp_path, trio)
    weights = place.own("donor", weights=False) / "model.safetensors"
    shutil.copy(trio / "donor" / "model.safetensors", weights)
    finish = Writer.finish

    def changed(self: Writer, *args: Any) -> None:
        os.utime(weights, ns=(1, 1))
        finish(self, *args)

    monkeypatch.setattr(Writer, "finish", changed)
    ran = vlmgraft(*merge(place))
    assert ran.code == 2 and str(weights) in ran.err and "changed while it was read" in ran.err, ran.err
    assert not (tmp_path / "out").exists()
