"""The command `export`: what it asks before it publishes, what each kind needs, what it says."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.mark.parametrize(("terminal", "answer", "code"), [(False, "", 2), (True, "n", 1), (True, "y", 0)])
def test_what_will_be_published_is_shown_first_and_asked_about(
    monkeypatch: pytest.MonkeyPatch, finished: Path, vlmgraft: Any, terminal: bool, answer: str, code: int
) -> None:
    (finished / "README.md").write_text("---\nlicense: apache-2.0\n---\n# mine\n")
    pushed: list[str] = []
    monkeypatch.setattr("vlmgraft.export.hub.push_to_hub", lambda _, name, **__: pushed.append(name) or "address")
    typed = io.StringIO(f"{answer}\n")
    monkeypatch.setattr(typed, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stdin", typed)
    monkeypatch.setattr("getpass.getpass", lambda *_: answer)
    ran = vlmgraft("export", finished, "--to", "hub", "--name", "org/name", "-q")
    assert ran.code == code and "Traceback" not in ran.err, ran.err
    assert pushed == (["org/name"] if code == 0 else [])
    assert ("--yes" in ran.err) == (not terminal)
    assert ("license: apache-2.0" in ran.err and "model-1.safetensors" in ran.err) == terminal


def test_yes_and_public_reach_the_hub(monkeypatch: pytest.MonkeyPatch, finished: Path, vlmgraft: Any) -> None:
    pushed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "vlmgraft.export.hub.push_to_hub",
        lambda folder, name, private, token: pushed.append((folder, name, private, token)) or "https://hub/commit",
    )
    ran = vlmgraft(
        "export", finished, "--to", "hub", "--name", "org/name", "--yes", "--public", "--token", "t", "--json"
    )
    assert ran.code == 0 and json.loads(ran.out) == {"address": "https://hub/commit"}
    assert pushed == [(finished, "org/name", False, "t")]
    assert "org/name, visible to everyone: 5 files" in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "hub"), "give --name organisation/name"),
        (("--to", "fp8", "--vlm", "v"), "give --out and --vlm"),
        (("--to", "fp8", "--out", "o"), "give --out and --vlm"),
        (("--to", "lora", "--out", "o", "--vlm", "v"), "give --out, --factors"),
        (("--to", "lora", "--out", "o", "--factors", "f"), "and --vlm"),
    ],
)
def test_what_a_kind_needs_is_asked_for(words: tuple[str, ...], said: str, finished: Path, vlmgraft: Any) -> None:
    ran = vlmgraft("export", finished, *words)
    assert ran.code == 2 and said in ran.err and ran.err.startswith(f"vlmgraft: export --to {words[1]}: ")


def test_a_front_becomes_an_adapter_for_every_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vlmgraft: Any
) -> None:
    """And a folder of gates one; `front.jsonl` tells them apart."""
    asked: list[tuple[Any, ...]] = []
    report = SimpleNamespace(rank=8, error=0.0125)
    monkeypatch.setattr("vlmgraft.pipeline.export_lora", lambda *a, **k: asked.append((*a, k)) or report)
    monkeypatch.setattr("vlmgraft.pipeline.export_front", lambda *a, **k: asked.append((*a, k)) or {"b": report})
    words = ("--to", "lora", "--out", tmp_path / "o", "--factors", tmp_path / "f", "--vlm", "v", "--rank", "8")
    one = vlmgraft("export", tmp_path, *words)
    (tmp_path / "front.jsonl").touch()
    several = vlmgraft("export", tmp_path, *words)
    assert (one.code, several.code) == (0, 0)
    assert one.out == f"{tmp_path / 'o'}: rank 8, 1.25 % of the update's norm is left out\n"
    assert several.out == f"{tmp_path / 'o' / 'b'}: rank 8, 1.25 % of the update's norm is left out\n"
    assert asked == [(tmp_path, tmp_path / "o", {"factors": tmp_path / "f", "vlm": "v", "rank": 8})] * 2
