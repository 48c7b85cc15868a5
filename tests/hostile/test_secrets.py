"""A token is in nothing that is printed or written, whatever goes wrong; the code of a checkpoint is spoken of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import Place, evaluate, merge

Run = Callable[..., Any]
SECRET = "hf_TheTokenThatNobodyMaySee"
KEY = "sk-TheKeyThatNobodyMaySee"


def everything(folder: Path) -> bytes:
    """Names and content of all that was written in a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return b"".join(str(path).encode() + path.read_bytes() for path in files)


@pytest.fixture
def place(trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return Place(tmp_path, trio)


def commands(place: Place) -> dict[str, list[str | Path]]:
    """Commands that do their work, and others that fail at one stage or another."""
    questions = place.questions({"question": "q", "answer": "a"})
    judged = ["--judge", "http://127.0.0.1:9/v1", "--judge-model", "m", "--max-new-tokens", "1"]
    named = ["--vlm", "nobody/nothing", "--donor", "nobody/else"]
    return {
        "a merge": [*merge(place), "--token", SECRET],
        "an option that is none": [*merge(place), "--token", SECRET, "--tokens"],
        "a model that is not there": ["inspect", *named, "--token", SECRET],
        "a judge that is not there": [*evaluate(place, questions), *judged],
        "a recipe that is none": ["merge", questions, "--out", place.folder / "out", f"--token={SECRET}"],
        "an initial recipe": ["init", *named, "--out", place.folder / "new.yaml"],
    }


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("a merge", 0),
        ("an option that is none", 2),
        ("a model that is not there", 2),
        ("a judge that is not there", 1),
        ("a recipe that is none", 2),
        ("an initial recipe", 0),
    ],
)
def test_neither_printed_nor_written(name: str, code: int, place: Place, vlmgraft: Run) -> None:
    ran = vlmgraft(*(word for word in commands(place)[name] if word != "--quiet"), "-vv")
    assert ran.code == code, ran.err
    for secret in (SECRET, KEY):
        assert secret not in ran.out + ran.err and secret.encode() not in everything(place.folder)


BROKEN = "import vlmgraft.pipeline as p, vlmgraft.cli as c; p.merge = lambda *a, **k: {}[0]; c.main()"


def test_not_in_the_traceback_of_a_mistake_of_ours(place: Place) -> None:
    command = [sys.executable, "-c", BROKEN, *map(str, merge(place)), "--token", SECRET]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert ran.returncode == 1 and "KeyError" in ran.stderr and "Please report it" in ran.stderr
    assert SECRET not in ran.stdout + ran.stderr


def test_a_judges_address_holds_no_password(place: Place, vlmgraft: Run) -> None:
    questions = place.questions({"question": "q", "answer": "a"})
    ran = vlmgraft(*evaluate(place, questions), "--judge", f"http://me:{KEY}@127.0.0.1:9/v1", "--judge-model", "m")
    assert ran.code == 2 and "OPENAI_API_KEY" in ran.err and KEY not in ran.err


@pytest.mark.parametrize("name", ["vlm", "donor", "base"])
def test_code_of_a_checkpoint_is_spoken_of(name: str, place: Place, vlmgraft: Run) -> None:
    file = place.own(name, weights=True) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}))
    key = {"base": "donor base"}.get(name, name)
    ran = vlmgraft("inspect", place.recipe())
    assert ran.code == 0 and f"{key}: its config.json names Python code of its own" in ran.out, ran
