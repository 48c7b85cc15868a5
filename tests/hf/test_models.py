"""Loading models, configs and processors: what is wrong with a folder is an input error that names it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from vlmgraft.errors import CheckpointError
from vlmgraft.hf import models
from vlmgraft.hf.models import load_config, load_processor, load_text_model, load_vlm


def test_a_folder_that_is_no_model_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_vlm(tmp_path)


def test_what_transformers_refuses_is_named(trio: Path, tmp_path: Path) -> None:
    shutil.copytree(trio / "donor", tmp_path / "donor")
    file = tmp_path / "donor" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_attention_heads": 0}))
    with pytest.raises(CheckpointError, match=r"donor.*(cannot be loaded|config\.json is not one)"):
        load_text_model(tmp_path / "donor")
    file.write_text(json.dumps({**config, "model_type": "unheard-of"}))
    with pytest.raises(CheckpointError, match=r"config\.json is not one that transformers reads"):
        load_config(tmp_path / "donor")


def test_what_torch_asserts_and_what_is_not_installed_is_told(trio: Path, tmp_path: Path) -> None:
    """transformers raises AssertionError and ImportError over a folder's files, too."""
    shutil.copytree(trio / "vlm", tmp_path / "vlm")
    config, processor = (tmp_path / "vlm" / name for name in ("config.json", "processor_config.json"))
    text = config.read_text()
    changed = json.loads(text)
    changed["text_config"]["pad_token_id"] = 10**6
    config.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=r"AssertionError: Padding_idx"):
        load_vlm(tmp_path / "vlm")
    config.write_text(text)
    if importlib.util.find_spec("num2words") is None:
        processor.write_text(json.dumps({**json.loads(processor.read_text()), "processor_class": "SmolVLMProcessor"}))
        with pytest.raises(CheckpointError, match=r"ImportError: .*pip install num2words"):
            load_processor(tmp_path / "vlm")


def test_a_mistake_of_ours_is_not_blamed_on_the_folder(trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> Any:
        raise TypeError("our own")

    monkeypatch.setattr(models, "load_json", wrong)
    with pytest.raises(TypeError, match="our own"):
        load_processor(trio / "donor")


def test_a_text_folder_that_declares_the_generic_tokenizer_gets_it(trio: Path, tmp_path: Path) -> None:
    shutil.copytree(trio / "donor", tmp_path / "donor")
    file = tmp_path / "donor" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
    assert type(load_processor(tmp_path / "donor")) is PreTrainedTokenizerFast


@pytest.mark.parametrize("declared", ["PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer"])
def test_processors_of_transformers_4_are_processors(declared: str, trio: Path, tmp_path: Path) -> None:
    """Their class stands in preprocessor_config.json alone."""
    folder = tmp_path / "vlm"
    shutil.copytree(trio / "vlm", folder)
    new = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    old = {**new["image_processor"], "processor_class": new["processor_class"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    file = folder / "tokenizer_config.json"
    tokenizer = {**json.loads(file.read_text()), "tokenizer_class": declared}
    file.write_text(json.dumps({key: value for key, value in tokenizer.items() if key != "processor_class"}))
    assert type(load_processor(folder)).__name__ == new["processor_class"]
    (folder / "preprocessor_config.json").write_text(json.dumps({**old, "processor_class": "NoSuchProcessor"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(
        CheckpointError, match=r"no processor that this .*preprocessor_config\.json names 'NoSuchProcessor'"
    ):
        load_processor(folder)
