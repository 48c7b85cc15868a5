"""What the trainer learns from: the labels are the answer and nothing else; options and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmgraft.data.traces import Trace, Traces
from vlmgraft.errors import AlignmentError, CheckpointError, DataError, RecipeError
from vlmgraft.finetuning.trainer import add_tokens, build_trainer, freeze_vision, lora_config, trainer_arguments
from vlmgraft.hf import templates
from vlmgraft.hf.models import load_processor, load_vlm

QUIET = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_steps": 2}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 128, 3), dtype=np.uint8))


def trace(answer: str, question: str = "list all colours", images: int = 1, seed: int = 0) -> Trace:
    parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return Trace(({"role": "user", "content": parts},), answer, tuple(picture(seed + n) for n in range(images)))


@pytest.fixture
def processor(trio: Path) -> Any:
    return load_processor(trio / "vlm")


@pytest.fixture
def model(trio: Path) -> Any:
    return load_vlm(trio / "vlm", torch.float32)


def built(model: Any, processor: Any, tmp_path: Path, *traces: Trace, **options: Any) -> Any:
    arguments = trainer_arguments(tmp_path, QUIET)
    return build_trainer(model, processor, Traces(traces, "here"), arguments, **options)


def test_only_the_answer_is_learned_in_a_mixed_batch(model: Any, processor: Any, tmp_path: Path) -> None:
    answers = ["<think> 4 + 5 = 9 </think> 9", "red", "1 2 3"]
    traces = [
        trace(answers[0], "what is the sum of all digits ?"),
        trace(answers[1], images=2),
        trace(answers[2], images=0),
    ]
    trainer = built(model, processor, tmp_path, *traces)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    for row, answer in enumerate(answers):
        learned = batch["labels"][row][batch["labels"][row] != -100]
        assert processor.tokenizer.decode(learned) == f"{answer} <|im_end|>"
        assert learned.equal(batch["input_ids"][row][batch["labels"][row] != -100])
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert trainer.train().training_loss > 0


def test_earlier_answers_are_not_learned(model: Any, processor: Any, tmp_path: Path) -> None:
    first = trace("red", images=1)
    turns = (
        *first.prompt,
        {"role": "assistant", "content": [{"type": "text", "text": "blue"}]},
        *trace("", images=0).prompt,
    )
    trainer = built(model, processor, tmp_path, Trace(turns, "red", first.images))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    blue = processor.tokenizer.convert_tokens_to_ids("blue")
    assert blue in batch["input_ids"] and blue not in batch["labels"]


def test_the_vision_tower_is_frozen_and_lora_stays_in_the_text_model(
    model: Any, processor: Any, tmp_path: Path
) -> None:
    freeze_vision(model)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert "lm_head.weight" in trained and not any("visual" in name for name in trained)
    trainer = built(model, processor, tmp_path, trace("red"), lora=lora_config({"r": 2}, model))
    adapted = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert len(adapted) == 2 * 7 * 4 and all("language_model.layers" in name for name in adapted)
    with pytest.raises(RecipeError, match=r"lora: .*rank_of"):
        lora_config({"rank_of": 3}, model)


def test_arguments_are_the_trainers(tmp_path: Path) -> None:
    arguments = trainer_arguments(tmp_path, {"epochs": 2, "use_cpu": True, "learning_rate": 1e-3})
    assert arguments.num_train_epochs == 2 and arguments.learning_rate == 1e-3 and arguments.max_length is None
    for given, said in (
        ({"learning_rat": 1}, r"train\.learning_rat: .*did you mean 'learning_rate'"),
        ({"output_dir": "x"}, r"train\.output_dir: is set by the command"),
        ({"save_strategy": "sometimes"}, "train: .*sometimes"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_steps is given too"),
        ({"warmup_ratio": 1}, r"train\.warmup_ratio: 1 must be"),
        ({"warmup_ratio": "some"}, r"train\.warmup_ratio: 'some' must be"),
        ({"accelerator_config": 0}, r"train\.accelerator_config: 0: input should be a valid dict"),  # not descriptor 0
        ({"learning_rate": "fast"}, r"train\.learning_rate: 'fast': input should be a valid number"),
    ):
        with pytest.raises(RecipeError, match=said):
            trainer_arguments(tmp_path, given)


def test_fields_are_taken_by_older_and_newer_names(tmp_path: Path) -> None:
    """Of 200 steps, a tenth is warm-up whether it is called a ratio or not; checkpointing has two names."""
    common = {"use_cpu": True}
    ratio, steps = (trainer_arguments(tmp_path, {**common, key: 0.1}) for key in ("warmup_ratio", "warmup_steps"))
    assert ratio.get_warmup_steps(200) == steps.get_warmup_steps(200) == 20
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        found = trainer_arguments(tmp_path, {**common, name: True})
        assert getattr(found, "activation_checkpointing", None) or getattr(found, "gradient_checkpointing", None)


def test_new_tokens_grow_the_vocabulary_on_request_only(model: Any, processor: Any, tmp_path: Path) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    assert add_tokens(model, processor, ["<think>", "</think>"]) == 0  # the lab has them
    assert model.get_input_embeddings().weight.shape[0] == rows
    assert add_tokens(model, processor, ["<plan>", "</plan>"]) == 2
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == rows + 2
    assert processor.tokenizer("<plan> 1").input_ids[0] == rows


def test_what_cannot_be_learned_is_named(model: Any, processor: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: \d+ tokens, the model reads 256"):
        built(model, processor, tmp_path, trace(" ".join(["1 +"] * 200)))
    processor.tokenizer.add_tokens(["<plan>"])
    with pytest.raises(AlignmentError, match="the processor has token"):
        built(model, processor, tmp_path, trace("<plan> 1"))
    with pytest.raises(Exception, match="tokenizer but no processor"):
        built(model, processor.tokenizer, tmp_path, trace("red"))


def test_an_example_that_fails_in_the_middle_is_named(model: Any, processor: Any, tmp_path: Path) -> None:
    """A picture of an impossible shape, among others: only the longest answer is tried before the training."""
    thin = Trace(trace("red", "how thin ?").prompt, "red", (Image.new("RGB", (2, 2000)),))
    trainer = built(model, processor, tmp_path, thin, trace("red red red"), trace("red red"))
    with pytest.raises(DataError, match=r"cannot be read by the processor \(absolute aspect ratio .*'how thin \?'"):
        trainer.train()


def test_a_text_that_shows_pictures_is_refused(model: Any, processor: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"here, row 2: its text holds <\|image_pad\|>, .*mend the row"):
        built(model, processor, tmp_path, trace("red"), trace("red", "<|image_pad|> ?"))


def test_a_template_without_end_is_refused(
    model: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(processor, "chat_template", endless)
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    with pytest.raises(CheckpointError, match=r"chat template cannot be rendered \(TimeoutError: more than 0.2 s"):
        built(model, processor, tmp_path, trace("red"))
