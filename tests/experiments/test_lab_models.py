"""The lab's models: prompts as trained are prompts as asked; the text model that is trained is the VLM's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from experiments.lab import batches, models, tasks
from vlmgraft.hf.batches import Question, encode
from vlmgraft.hf.models import load_processor
from vlmgraft.lab import world
from vlmgraft.lab.exam import draw_exam

TASKS = (*world.PERCEPTION, "sum", "copy", "fact")


@pytest.fixture(scope="module")
def vlm(trio: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(trio / "vlm", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(trio: Path) -> Any:
    return AutoProcessor.from_pretrained(trio / "vlm")


def trained_ids(item: world.ExamItem, as_image: bool) -> list[int]:
    """The prompt of `batches.encode`: all but the end token of an empty answer."""
    blank = world.ExamItem(item.task, item.question, "", item.scene)
    return batches.encode([blank], [as_image]).ids[0, :-1].tolist()


@pytest.mark.parametrize(
    ("task", "as_image"),
    [(task, form) for task in TASKS for form in (True, False) if not (form and task in tasks.TEXT_ONLY)],
)
def test_prompts_are_those_of_training(task: str, as_image: bool, trio: Path, processor: Any) -> None:
    exam = draw_exam(0, "test", {task: 5}, as_image=as_image, draw=tasks.draw_item)
    for item, question in zip(exam.items, exam.questions, strict=True):
        assert bool(question.images) is as_image
        expected = trained_ids(item, as_image)
        assert encode(processor, [question])["input_ids"][0].tolist() == expected
        if not as_image:
            for folder in ("base", "donor"):
                text = encode(load_processor(trio / folder), [question])["input_ids"][0].tolist()
                assert text == expected


def test_image_and_text_form_have_the_same_length_and_positions() -> None:
    """Eight visual tokens stand where the eight words stand."""
    item = world.draw_item(np.random.default_rng(0), "sum")
    shown, told = trained_ids(item, True), trained_ids(item, False)
    differ = [at for at, (one, other) in enumerate(zip(shown, told, strict=True)) if one != other]
    assert differ == list(range(3, 11))
    assert [batches.WORDS[token] for token in told[3:11]] == list(item.scene.words if item.scene else ())


def test_every_word_is_one_token_and_comes_back() -> None:
    tokenizer = models.build_tokenizer()
    for index, word in enumerate(tasks.vocabulary()):
        assert tokenizer(word)["input_ids"] == [index]
        assert tokenizer.decode([index]) == word


@pytest.mark.parametrize("made", ["fresh", "embedded"])
def test_text_model_with_visual_tokens_is_the_vlm(made: str, vlm: Any, processor: Any) -> None:
    """Training runs a plain Qwen2 on the tower's output; with the lab's rotary sections that is the VLM's forward."""
    items = [world.draw_item(np.random.default_rng(seed), "read") for seed in range(6)]
    drawn = np.random.default_rng(1)
    pictures = [world.render(drawn, item.scene, "test") for item in items if item.scene]
    batch = encode(processor, [Question(item.question, (image,)) for item, image in zip(items, pictures, strict=True)])
    tower, text = batches.Tower(0), models.build_text_model(0).eval()
    if made == "embedded":
        tower.vlm = vlm
        for module in text.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = vlm.config.text_config.rms_norm_eps
    whole_model = tower.vlm.eval()
    text.model.load_state_dict(whole_model.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole_model.lm_head.state_dict())
    with torch.no_grad():
        visual = tower.see(np.random.default_rng(1), items, "test")
        embeds = text.model.embed_tokens(batch["input_ids"])
        embeds = embeds.masked_scatter((batch["input_ids"] == batches.IMAGE)[..., None], visual.reshape(-1, 128))
        own = text(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        whole = whole_model(**batch).logits
    assert float((own - whole).abs().max()) < 1e-5 * float(whole.abs().max())
    assert float(whole.std(0).max()) > 0.1, "what is shown matters"


@pytest.mark.parametrize("name", ["base", "vlm", "donor"])
def test_embedded_weights_load_in_bf16(name: str, trio: Path) -> None:
    auto = AutoModelForImageTextToText if name == "vlm" else AutoModelForCausalLM
    model, told = auto.from_pretrained(trio / name, output_loading_info=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert model.config.get_text_config(decoder=True).vocab_size == len(tasks.vocabulary())


def test_embedded_weights_are_small(trio: Path) -> None:
    assert sum(path.stat().st_size for path in trio.rglob("*") if path.is_file()) <= 8_000_000


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = models.build_text_model(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    models.save(model, tmp_path / "model")
    after = model.state_dict()
    assert all(
        torch.equal(tensor, after[name]) and after[name].dtype == torch.float32 for name, tensor in before.items()
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(tensor.bfloat16(), loaded.state_dict()[name]) for name, tensor in before.items())
