"""Model card and side files."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import yaml

from vlmgraft.alignment import AlignedTensor, Alignment, Source
from vlmgraft.checkpoint.index import Checkpoint
from vlmgraft.export.card import copy_side_files, model_card, side_files, write_model_card

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


def test_a_card_without_licences_says_so(alignment: Alignment) -> None:
    _, header, body = model_card(RECIPE, alignment).split("---\n", 2)
    assert "license" not in yaml.safe_load(header) and "No licence is given" in body


def test_measured_divergence_has_its_table(alignment: Alignment) -> None:
    card = model_card(RECIPE, alignment, divergence={"KL, held out": 0.00315})
    assert "| KL, held out | 0.00315 |" in card
    assert "## Divergence" not in model_card(RECIPE, alignment)
