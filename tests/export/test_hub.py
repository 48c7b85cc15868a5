"""A finished folder to the hub, without a network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from vlmgraft.errors import InputError, OutputError
from vlmgraft.export.hub import published, push_to_hub


def test_push_creates_the_repository_and_uploads_the_folder(monkeypatch: pytest.MonkeyPatch, finished: Path) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            assert token == "secret"

        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> SimpleNamespace:
            calls.append(("upload", options))
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push_to_hub(finished, "org/name", token="secret") == "https://hub/commit"
    assert calls[0] == ("org/name", {"private": True, "exist_ok": True})
    assert calls[1][1]["repo_id"] == "org/name" and calls[1][1]["folder_path"] == finished
    listed = [file.name for file in published(finished)]
    assert calls[1][1]["allow_patterns"] == listed
    assert listed == sorted(path.name for path in finished.iterdir() if path.name != ".hidden")


@pytest.mark.parametrize("missing", ["config.json", "README.md", "model-2.safetensors"])
def test_an_unfinished_folder_is_not_pushed(finished: Path, missing: str) -> None:
    (finished / missing).unlink()
    with pytest.raises(OutputError, match=missing):
        push_to_hub(finished, "org/name")


def test_what_the_hub_refuses_is_explained(monkeypatch: pytest.MonkeyPatch, finished: Path) -> None:
    class Api:
        def __init__(self, token: str | None) -> None: ...

        def create_repo(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("no route\nmore")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(InputError, match=r"cannot be reached \(no route\)"):
        push_to_hub(finished, "org/name")
    with pytest.raises(InputError, match="a hub id is"):
        push_to_hub(finished, "name")


def test_what_is_hidden_stays_here_at_any_depth(finished: Path) -> None:
    """Files of folders are named from the root, with their sizes."""
    (finished / "templates").mkdir()
    (finished / "templates" / "chat.jinja").write_text("four")
    (finished / ".cache").mkdir()
    (finished / ".cache" / "token").write_text("secret")
    listed = {file.name: file.nbytes for file in published(finished)}
    assert listed.pop("templates/chat.jinja") == 4
    assert set(listed) == {
        "README.md",
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
    }
