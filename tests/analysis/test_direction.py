"""The direction from a donor: states by hand, answers with and without their thinking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmgraft.analysis.direction import contrast_direction, steer, without_chain
from vlmgraft.errors import DataError
from vlmgraft.hf.batches import Question, encode, generate_batch
from vlmgraft.hf.models import load_processor, load_text_model
from vlmgraft.lab.exam import draw_exam

SUMS = list(draw_exam(0, "calibration", {"sum": 3}, as_image=False).questions)


@pytest.fixture(scope="module")
def donor(trio: Path) -> tuple[Any, Any]:
    return load_text_model(trio / "donor", torch.float32), load_processor(trio / "donor")


@torch.no_grad()
def test_prompts_differ_in_the_state_of_their_last_token(donor: tuple[Any, Any]) -> None:
    """One question at a time through transformers' own hidden states."""
    model, processor = donor
    texts = ("1 2", "3")
    sides = []
    for text in texts:
        states = [
            model(**encode(processor, [Question(f"{one.question}\n{text}")]), output_hidden_states=True).hidden_states[
                2
            ]
            for one in SUMS
        ]
        sides.append(torch.stack([state[0, -1] for state in states]))
    found = contrast_direction(model, processor, SUMS, 1, instructions=texts, batch_size=2)
    torch.testing.assert_close(found, (sides[0] - sides[1]).mean(0), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_answers_differ_in_their_mean_state(donor: tuple[Any, Any]) -> None:
    model, processor = donor
    answers, _ = generate_batch(model, processor, SUMS, 28)
    close = processor.convert_tokens_to_ids("</think>")
    differences = []
    for question, answer in zip(SUMS, answers, strict=True):
        tail = answer[answer.index(close) + 1 :]
        assert without_chain(processor, answer) == tail and without_chain(processor, tail) == []
        prompt = encode(processor, [question])["input_ids"][0].tolist()
        means = []
        for text in (answer, tail):
            states = model(input_ids=torch.tensor([prompt + text]), output_hidden_states=True).hidden_states[2][0]
            means.append(states[len(prompt) - 1 : len(prompt) + len(text) - 1].mean(0))
        differences.append(means[0] - means[1])
    found = contrast_direction(model, processor, SUMS, 1, contrast="answers", max_new_tokens=28)
    torch.testing.assert_close(found, torch.stack(differences).mean(0), atol=1e-5, rtol=1e-4)


def test_answers_without_thinking_are_refused(donor: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="contrast: prompts"):
        contrast_direction(*donor, SUMS, 1, contrast="answers", max_new_tokens=2)


def test_questions_with_images_are_refused_before_the_donor_is_loaded(
    trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "asked.jsonl").write_text('{"question": "What?"}\n{"question": "Which?", "image": "a.png"}\n')
    monkeypatch.setattr("vlmgraft.analysis.direction.load_text_model", lambda *_: pytest.fail("loaded"))
    recipe = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor")}
    with pytest.raises(DataError, match=r"asked\.jsonl, line 2: has an image, and the donor reads text only"):
        steer(recipe, tmp_path / "out.safetensors", tmp_path / "asked.jsonl")


def test_a_small_donor_is_read_with_one_thread(donor: tuple[Any, Any], threads_seen: list[int]) -> None:
    contrast_direction(*donor, SUMS, 1)
    assert set(threads_seen) == {1}
