"""Model card, side files and push, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml

from vlmgraft.alignment import AlignedTensor, Alignment, Source
from vlmgraft.card import model_card, push_to_hub, side_files, tensor_row, write_model_card
from vlmgraft.checkpoint.index import Checkpoint
from vlmgraft.errors import InputError, OutputError

RECIPE = {
    "vlm": "Qwen/Qwen2.5-VL-7B-Instruct@main",
    "donor": "org/reasoner",
    "donor_base": "/models/base",
    "method": {"name": "task_arithmetic", "scale": 0.5},
    "modules": ["attention"],
    "layers": "all",
    "output": {"shard_size": "5GB"},
}


@pytest.fixture
def alignment() -> Alignment:
    checkpoint = Checkpoint(Path("x"), {}, (), {})
    tensors = (
        AlignedTensor("visual.x", "kept", "outside the language model"),
        AlignedTensor("q", "merged", "language model", "layers.0.q", 0, "attention", Source(("dq",)), Source(("bq",))),
        AlignedTensor("n", "excluded", "norm is not in modules", "norm.weight", None, "norm"),
    )
    return Alignment(checkpoint, checkpoint, None, None, tensors, 1, "qwen2_5_vl", ("a note",))


def test_the_card_names_hub_models_only_and_carries_the_recipe(alignment: Alignment, tmp_path: Path) -> None:
    card = write_model_card(tmp_path, RECIPE, alignment, ["took 3 s"]).read_text()
    _, header, body = card.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["base_model"] == ["Qwen/Qwen2.5-VL-7B-Instruct", "org/reasoner"]
    assert metadata["base_model_relation"] == "merge" and "task_arithmetic" in metadata["tags"]
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]) == RECIPE
    for said in (
        "1 merged (attention 1)",
        "1 excluded",
        "1 kept",
        "- a note",
        "- took 3 s",
        "| donor's base | `/models/base` |",
    ):
        assert said in body


def test_a_card_of_local_folders_names_no_base_model(alignment: Alignment) -> None:
    local = {**RECIPE, "vlm": "/a/vlm", "donor": "/a/donor"}
    assert "base_model" not in yaml.safe_load(model_card(local, alignment).split("---\n")[1])


def test_the_metadata_is_valid_for_the_hub(alignment: Alignment) -> None:
    card = huggingface_hub.ModelCard(model_card(RECIPE, alignment))
    assert card.data.base_model == ["Qwen/Qwen2.5-VL-7B-Instruct", "org/reasoner"]
    assert card.data.pipeline_tag == "image-text-to-text"


def test_side_files_are_everything_but_weights_and_other_cards(tmp_path: Path) -> None:
    kept = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "tokenizer.model",
    ]
    other = ["model.safetensors", "model.safetensors.index.json", "README.md", "training_args.bin", ".gitattributes"]
    for name in kept + other:
        (tmp_path / name).touch()
    (tmp_path / "checkpoint-1").mkdir()
    assert [path.name for path in side_files(tmp_path)] == kept


def test_a_row_is_json(alignment: Alignment) -> None:
    row = json.loads(json.dumps(tensor_row(alignment.merged[0])))
    assert row["donor"] == ["dq"] and row["donor_base"] == ["bq"] and "vlm_base" not in row


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    for name in ("config.json", "README.md", "model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).touch()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


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
