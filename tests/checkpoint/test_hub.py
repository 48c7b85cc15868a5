"""Hub ids without a network: what is asked of huggingface_hub, and what becomes of its errors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from vlmgraft.checkpoint.hub import fetch, is_hub_id, split_id
from vlmgraft.checkpoint.index import open_headers, remote_headers
from vlmgraft.errors import CheckpointError

REPOSITORY = [
    "config.json",
    "chat_template.jinja",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "modeling_x.py",
    "tokenizer.model",
    "consolidated.safetensors",
    "onnx/model.onnx",
    "additional_chat_templates/tool_use.jinja",
    "onnx/config.json",
    "original/model.safetensors",
    "pytorch_model.bin",
    "README.md",
    "training_args.bin",
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A `snapshot_download` that copies nothing and writes the files it would have downloaded."""
    calls: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
        files = sorted(filter_repo_objects(REPOSITORY, **patterns))
        calls.append({"name": name, "revision": options["revision"], "files": files})
        for file in files:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_only_what_is_needed_is_downloaded(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    assert fetch("org/name@v1") == tmp_path
    call, templates = asked
    assert templates["files"] == ["additional_chat_templates/tool_use.jinja"]
    assert (call["name"], call["revision"]) == ("org/name", "v1")
    assert call["files"] == sorted(REPOSITORY[:6])


def test_headers_only_leaves_the_weights(asked: list[dict[str, Any]]) -> None:
    fetch("org/name", headers_only=True)
    assert not any(file.endswith(".safetensors") for file in asked[0]["files"])
    assert "config.json" in asked[0]["files"]


def test_a_model_without_safetensors_is_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"pickled .bin weights are not read.*hf download org/name"):
        fetch("org/name")


def test_headers_come_by_range_requests_in_disk_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))

    def tensor(begin: int, end: int, *shape: int) -> SimpleNamespace:
        return SimpleNamespace(dtype="BF16", shape=list(shape), data_offsets=(begin, end))

    files = {
        "model-2.safetensors": SimpleNamespace(tensors={"c": tensor(0, 4, 2)}),
        "model-1.safetensors": SimpleNamespace(tensors={"b": tensor(8, 16, 2, 2), "a": tensor(0, 8, 4)}),
    }

    class Api:
        def get_safetensors_metadata(self, name: str, revision: str | None) -> SimpleNamespace:
            assert (name, revision) == ("org/name", "main")
            return SimpleNamespace(files_metadata=files)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    checkpoint = remote_headers("org/name@main")
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert [file.name for file in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert (checkpoint.tensors["b"].shape, checkpoint.tensors["b"].nbytes) == ((2, 2), 8)
    assert checkpoint.config == {"model_type": "qwen2"}
    assert open_headers("org/name@main") == checkpoint
    files["model-1.safetensors"].tensors["a.quant_state.bitsandbytes__nf4"] = tensor(16, 20, 4)
    with pytest.raises(CheckpointError, match=r"org/name@main: is quantised to 4 bits .*`hf download org/name`"):
        open_headers("org/name@main")
    with pytest.raises(CheckpointError, match="no model"):
        open_headers(tmp_path)  # a folder is a folder, whatever it holds


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.GatedRepoError, "gated; accept"),
        (errors.RepositoryNotFoundError, "no such model on the hub"),
        (errors.RevisionNotFoundError, "this revision does not"),
        (errors.LocalEntryNotFoundError, "cannot be downloaded"),
        (ConnectionError, "cannot be downloaded"),
        (errors.NotASafetensorsRepoError, "pickled"),
    ],
)
def test_errors_of_the_hub_are_explained(monkeypatch: pytest.MonkeyPatch, error: type[Exception], said: str) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=said):
        fetch("org/name")


def test_ids() -> None:
    assert split_id("org/name") == ("org/name", None)
    assert split_id("gpt2@main") == ("gpt2", "main")
    assert is_hub_id("org/name@x") and not is_hub_id("/tmp") and not is_hub_id("./a/b/c")
    with pytest.raises(CheckpointError, match="no such folder, and not a hub id"):
        split_id("./folder/that/is/absent")
