"""The direction from a donor: states by hand, answers with and without their thinking, the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmgraft.analysis.direction import contrast_direction, steer, without_chain
from vlmgraft.errors import DataError
from vlmgraft.hf.batches import Question, encode, generate_batch
from vlmgraft.hf.models import load_processor, load_text_model
from vlmgraft.hf.steering import Steering, resample
from vlmgraft.lab.exam import draw_exam, save_questions

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


def test_the_commands(vlmgraft: Callable[..., Any], trio: Path, tmp_path: Path) -> None:
    """A vector is made, written and used by `evaluate` and `drift`; at strength 0 the KL is 0."""
    save_questions(draw_exam(0, "calibration", {"sum": 4}, as_image=False).questions, tmp_path / "q.jsonl")
    (tmp_path / "r.yaml").write_text(f"vlm: {trio / 'vlm'}\ndonor: {trio / 'donor'}\n")
    asked = ("steer", tmp_path / "r.yaml", "--questions", tmp_path / "q.jsonl", "--contrast", "answers", "--quiet")
    asked = (*asked, "--max-new-tokens", "28", "--out", tmp_path / "v.safetensors", "--json")
    ran = vlmgraft(*asked, "--strength", "0.2")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert (facts["layer"], facts["donor_layer"], facts["samples"], facts["strength"]) == (2, 2, 4, 0.2)
    steering = Steering.load(tmp_path / "v.safetensors")
    model, processor = load_text_model(trio / "donor", torch.float32), load_processor(trio / "donor")
    questions = list(draw_exam(0, "calibration", {"sum": 4}, as_image=False).questions)
    raw = contrast_direction(model, processor, questions, 2, contrast="answers", max_new_tokens=28)
    torch.testing.assert_close(steering.direction, resample(raw, 128, 0.25), atol=1e-5, rtol=1e-4)
    save_questions(draw_exam(0, "test", {"read": 4}).questions, tmp_path / "d.jsonl")
    command = ("drift", trio / "vlm", trio / "vlm", "--data", tmp_path / "d.jsonl", "--quiet", "--json")
    command = (*command, "--steer", tmp_path / "v.safetensors")
    assert json.loads(vlmgraft(*command).out)["kl"] > json.loads(vlmgraft(*command, "--steer-strength", "0").out)["kl"]
    evaluate = ("evaluate", trio / "vlm", "--data", "lab", "--limit", "4", "--quiet", "--out", tmp_path / "e")
    assert vlmgraft(*evaluate, "--steer", tmp_path / "v.safetensors").code == 0
    ran = vlmgraft(*evaluate, "--steer-strength", "1", "--out", tmp_path / "f")
    assert ran.code == 2 and "no steering vector" in ran.err


def test_a_small_donor_is_read_with_one_thread(donor: tuple[Any, Any], threads_seen: list[int]) -> None:
    contrast_direction(*donor, SUMS, 1)
    assert set(threads_seen) == {1}
