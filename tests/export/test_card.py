"""Model card, side files and push, without a network."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml

from vlmgraft.alignment import AlignedTensor, Alignment, Source
from vlmgraft.checkpoint.index import Checkpoint
from vlmgraft.errors import InputError, OutputError
from vlmgraft.export.card import copy_side_files, model_card, side_files, write_model_card
from vlmgraft.export.hub import published, push_to_hub
from vlmgraft.export.licence import merged_licence, stated_licence

RECIPE = {
    "vlm": "Qwen/Qwen2.5-VL-7B-Instruct@main",
    "donor": "org/reasoner",
    "donor_base": "./base",
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
        "| donor's base | `base` | not stated |",
    ):
        assert said in body


def test_a_card_of_local_folders_names_no_base_model(alignment: Alignment) -> None:
    local = {**RECIPE, "vlm": "./vlm", "donor": "../a/donor"}
    assert "base_model" not in yaml.safe_load(model_card(local, alignment).split("---\n")[1])


def test_the_metadata_is_valid_for_the_hub(alignment: Alignment) -> None:
    card = huggingface_hub.ModelCard(model_card(RECIPE, alignment))
    assert card.data.base_model == ["Qwen/Qwen2.5-VL-7B-Instruct", "org/reasoner"]
    assert card.data.pipeline_tag == "image-text-to-text"


def test_side_files_are_everything_but_weights_and_other_cards(tmp_path: Path) -> None:
    kept = [
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "tokenizer.model",
    ]
    other = [
        "adapter_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "README.md",
        "training_args.bin",
        ".gitattributes",
    ]
    for folder in ("checkpoint-1", "additional_chat_templates", "out"):
        (tmp_path / folder).mkdir()
    for name in kept + other:
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in side_files(tmp_path)] == kept
    copy_side_files(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / kept[0]).is_file()


@pytest.mark.parametrize(
    ("stated", "head", "words"),
    [
        ({"v": "mit", "d": "mit"}, {"license": "mit"}, ["mit"]),
        (
            {"v": "apache-2.0", "d": "mit"},
            {"license": "other", "license_name": "apache-2.0-and-mit"},
            ["`v`: apache-2.0", "`d`: mit"],
        ),
        ({"v": "apache-2.0", "d": None}, {}, ["`d`", "Look it up"]),
    ],
)
def test_a_licence_is_taken_over_only_where_all_agree(
    stated: dict[str, str | None], head: dict[str, str], words: list[str]
) -> None:
    found, sentence = merged_licence(stated)
    assert found == head and all(word in sentence for word in words)


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, None),
        ({"README.md": "---\nlicense: apache-2.0\n---\n# x"}, "apache-2.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: qwen-research\n---\n"}, "qwen-research"),
        ({"README.md": "# no head\n", "LICENSE": "MIT License\n\nCopyright"}, "mit"),
        ({"README.md": "---\n[broken: {\n---\n", "LICENSE": "all rights reserved"}, None),
        ({"LICENSE": "\n   Apache License\n   Version 2.0"}, "apache-2.0"),
    ],
)
def test_a_folder_states_its_licence_by_card_or_text(
    files: dict[str, str], licence: str | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert stated_licence(tmp_path) == licence


def test_a_card_without_licences_says_so(alignment: Alignment) -> None:
    _, header, body = model_card(RECIPE, alignment).split("---\n", 2)
    assert "license" not in yaml.safe_load(header) and "No licence is given" in body


def test_measured_divergence_has_its_table(alignment: Alignment) -> None:
    card = model_card(RECIPE, alignment, divergence={"KL, held out": 0.00315})
    assert "| KL, held out | 0.00315 |" in card
    assert "## Divergence" not in model_card(RECIPE, alignment)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    for name in ("config.json", "README.md", "model-1.safetensors", "model-2.safetensors", ".hidden"):
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
    listed = [file.name for file in published(finished)]
    assert calls[1][1]["allow_patterns"] == listed
    assert listed == sorted(path.name for path in finished.iterdir() if path.name != ".hidden")


@pytest.mark.parametrize("missing", ["config.json", "README.md", "model-2.safetensors"])
def test_an_unfinished_folder_is_not_pushed(finished: Path, missing: str) -> None:
    (finished / missing).unlink()
    with pytest.raises(OutputError, match=missing):
        push_to_hub(finished, "org/name")


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
