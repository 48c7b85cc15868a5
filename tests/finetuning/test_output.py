"""The folder of a fine-tuning: the VLM's names, order and dtypes whatever the trainer saved."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmgraft.checkpoint.index import Checkpoint, open_checkpoint
from vlmgraft.checkpoint.writer import Writer
from vlmgraft.errors import NumericalError, OutputError
from vlmgraft.finetuning import output
from vlmgraft.finetuning.output import Tuned, _card, _specs, _write, finished
from vlmgraft.finetuning.prior import PushVerdict
from vlmgraft.merging.receipt import fingerprint
from vlmgraft.recipe.tune import load_tune_recipe

HEAD, WORDS, BODY = "lm_head.weight", "model.embed_tokens.weight", "model.visual.weight"


def folder(path: Path, **tensors: torch.Tensor) -> Checkpoint:
    path.mkdir()
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return open_checkpoint(path)


@pytest.fixture
def vlm(tmp_path: Path) -> Checkpoint:
    tensors = {HEAD: torch.zeros(3, 2), WORDS: torch.zeros(3, 2), BODY: torch.full((2,), 7.0)}
    return folder(tmp_path / "vlm", **{name: tensor.bfloat16() for name, tensor in tensors.items()})


def written(vlm: Checkpoint, trained: Checkpoint, out: Path) -> dict[str, torch.Tensor]:
    with Writer(out, _specs(vlm, trained), 10**9) as writer:
        rows = list(_write(writer, vlm, trained))
    assert [row["name"] for row in rows] == list(vlm.tensors)
    return load_file(next(out.glob("*.safetensors")))


def test_names_and_dtypes_are_the_vlms_and_shapes_the_trained_ones(vlm: Checkpoint, tmp_path: Path) -> None:
    """A vocabulary that grew by a row; a head that the trainer does not save is the trained embeddings; what it did not
    save otherwise is as it was."""
    words = torch.arange(8.0).reshape(4, 2)
    made = written(vlm, folder(tmp_path / "saved", **{WORDS: words, HEAD: words.clone()}), tmp_path / "both")
    assert made[WORDS].dtype == torch.bfloat16 and made[WORDS].equal(words.bfloat16()) and made[HEAD].shape == (4, 2)
    assert made[BODY].tolist() == [7.0, 7.0]
    tied = torch.arange(6.0).reshape(3, 2)
    made = written(vlm, folder(tmp_path / "tied", **{WORDS: tied}), tmp_path / "one")
    assert made[HEAD].equal(tied.bfloat16())


def test_what_is_not_the_vlms_or_not_finite_is_named(vlm: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the trained model has model\.extra, the VLM has not"):
        _specs(vlm, folder(tmp_path / "extra", **{"model.extra": torch.zeros(1)}))
    for number, value in enumerate((float("nan"), 1e39)):  # the second is infinite in bfloat16
        broken = folder(tmp_path / f"broken{number}", **{BODY: torch.tensor([value, 0.0], dtype=torch.float64)})
        with pytest.raises(NumericalError, match=rf"{BODY}: NaN or infinity in BF16"):
            written(vlm, broken, tmp_path / f"out{number}")
        assert not (tmp_path / f"out{number}").exists()


@pytest.mark.parametrize("receipt", ["", "[]", "{}", '{"inputs": 1}', '{"inputs": "x", "prior": [{"a": 1}]}'])
def test_a_folder_that_no_run_finished_is_none(receipt: str, vlm: Checkpoint, tmp_path: Path) -> None:
    recipe = load_tune_recipe({"vlm": "v", "prior": "none", "data": {"train": "t.jsonl"}})
    assert finished(recipe, vlm, tmp_path / "nothing", {}) is None
    (tmp_path / "receipt.json").write_text(receipt)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    assert finished(recipe, vlm, tmp_path, {}) is None


def test_a_mistake_of_ours_is_no_unfinished_run(
    vlm: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_tune_recipe({"vlm": "v", "prior": "none", "data": {"train": "t.jsonl"}})
    inputs = fingerprint(vlm.files)
    receipt = {"inputs": inputs, "steps": 3, "train_loss": 0.5, "prior": [asdict(PushVerdict("w", "kept", "r"))]}
    receipt["contents"] = {}
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    (tmp_path / "recipe.yaml").write_text(json.dumps(output._written(recipe, tmp_path)))
    (tmp_path / "training.jsonl").write_text('{"loss": 0.5}\n')
    tuned = Tuned(tmp_path, 3, 0.5, (PushVerdict("w", "kept", "r"),), ({"loss": 0.5},))
    assert finished(recipe, vlm, tmp_path, {}) == tuned
    monkeypatch.setattr(output, "_written", lambda *_: {}["ours"])
    with pytest.raises(KeyError, match="ours"):
        finished(recipe, vlm, tmp_path, {})


def test_the_card_says_what_was_done_and_no_path(tmp_path: Path) -> None:
    recipe = load_tune_recipe({"vlm": "a/vlm", "donor": "/home/me/donor", "data": {"train": "/home/me/t.jsonl"}})
    verdicts = (PushVerdict("w", "pushed", "r"), PushVerdict("v", "kept", "r"))
    card = _card(recipe, Tuned(tmp_path / "out", 12, 0.34567, verdicts, ()))
    assert "`a/vlm` after supervised fine-tuning with DRIFT's gradient prior (adaptive, strength 1)" in card
    assert "12 steps" in card and "0.3457" in card and "1 tensors pushed" in card and "/home" not in card
