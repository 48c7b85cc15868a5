"""Steer: a donor's direction from answers without a chain of thought to answers with one; any donor architecture works.

L2V-CoT (arXiv 2511.17910): d = mean over questions of (hidden state with a chain of thought − without), at one middle
layer of the donor, low-pass filtered and resampled to the VLM's width (`hf/steering.py`). No code was released. Two
readings of "with" and "without" are implemented:

- `prompts`: the question followed by one of two instructions; the state is that of the prompt's last token. The
  paper's prompts ask for steps, or for a direct answer.
- `answers`: the donor's whole answer, and the part of it after the thinking; the state is the mean over the positions
  that predict the answer. This reading is ours, for donors that think regardless of the instruction.

Layer, share of frequencies and strength are our choices: half of the depth (the paper: middle layers), 0.25 and 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vlmgraft.data.questions import questions_digest
from vlmgraft.errors import DataError, RecipeError
from vlmgraft.evaluation.answers import without_reasoning
from vlmgraft.hf.batches import Question, append_answers, batches, encode, generate_batch, load_questions, to_device
from vlmgraft.hf.models import load_config, load_processor, load_text_model
from vlmgraft.hf.modules import hook_states, text_model, tokenizer_of
from vlmgraft.hf.placement import default_device, default_dtype, threads_of
from vlmgraft.hf.steering import Steering, resample
from vlmgraft.recipe.resolve import RecipeSource, read_recipe
from vlmgraft.storage.outputs import refuse_file
from vlmgraft.storage.portable import nameless
from vlmgraft.storage.progress import Progress

Contrast = Literal["prompts", "answers"]
INSTRUCTIONS = ("Let's think step by step.", "Answer the question directly.")


def steer(
    recipe: RecipeSource,
    out: str | Path,
    questions: str | Path,
    *,
    contrast: Contrast = "prompts",
    instructions: tuple[str, str] = INSTRUCTIONS,
    samples: int = 100,
    donor_layer: int | None = None,
    vlm_layer: int | None = None,
    kept: float = 0.25,
    strength: float = 0.1,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Steering:
    """Compute the direction from a recipe's donor for its VLM, and write it to the file `out`.

    Args:
        recipe: only its vlm and donor are read; they need not be of one family.
        questions: a file of text questions; answers in it are not read. instructions: with and without a chain of
            thought, for `prompts`.
        donor_layer, vlm_layer: counted from 0; default: the middle. kept: share of the donor's frequencies.
    Raises:
        RecipeError, DataError, CheckpointError: before the donor is loaded. OutputError: `out` is no steering file.
    """
    out = Path(out)
    refuse_file(out, lambda head: b'"steering"' in head)
    loaded = read_recipe(recipe, overrides, need_method=False)
    prompts = load_questions(questions, limit=samples)
    if seen := next((prompt for prompt in prompts if prompt.images), None):
        raise DataError(f"{seen.name}: has an image, and the donor reads text only; give a file of text questions")
    configs = {key: load_config(getattr(loaded, key)).get_text_config(decoder=True) for key in ("vlm", "donor")}
    layers = {
        key: config.num_hidden_layers // 2 if given is None else given
        for (key, config), given in zip(configs.items(), (vlm_layer, donor_layer), strict=True)
    }
    for key, config in configs.items():
        if not 0 <= layers[key] < config.num_hidden_layers:
            raise RecipeError(f"{key}_layer: {layers[key]} is no layer; there are 0 to {config.num_hidden_layers - 1}")
    resample(torch.ones(configs["donor"].hidden_size), configs["vlm"].hidden_size, kept)
    device = default_device()
    donor = load_text_model(loaded.donor, default_dtype(device), device)
    raw = contrast_direction(
        donor, load_processor(loaded.donor), prompts, layers["donor"],
        contrast=contrast, instructions=instructions, max_new_tokens=max_new_tokens, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    made_from = {
        "vlm": nameless(loaded.vlm), "donor": nameless(loaded.donor), "donor_layer": layers["donor"],
        "contrast": contrast,
        "questions": questions_digest(prompts), "samples": len(prompts), "kept": kept,
        "norm": float(raw.norm()),
    }  # fmt: skip
    steering = Steering(resample(raw, configs["vlm"].hidden_size, kept), layers["vlm"], strength, made_from)
    steering.save(out)
    return steering


@torch.no_grad()
def contrast_direction(
    donor: Any,
    processor: Any,
    questions: Sequence[Question],
    layer: int,
    *,
    contrast: Contrast = "prompts",
    instructions: tuple[str, str] = INSTRUCTIONS,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Float[Tensor, " width"]:
    """Mean over questions of (state with a chain of thought − without) after one decoder layer; float32.

    Raises:
        DataError: there are no questions, or no answer has a chain of thought.
    """
    total, count, done = torch.zeros((), dtype=torch.float64), 0, 0
    for indices in batches(questions, batch_size):
        batch = [questions[index] for index in indices]
        if contrast == "prompts":
            instructed = [
                [replace(question, question=f"{question.question}\n{text}") for question in batch]
                for text in instructions
            ]
            sides = [_states(donor, processor, prompts, None, layer) for prompts in instructed]
        else:
            answers, _ = generate_batch(donor, processor, batch, max_new_tokens)
            short = [without_chain(processor, answer) for answer in answers]
            batch = [question for question, tail in zip(batch, short, strict=True) if tail]
            whole = [answer for answer, tail in zip(answers, short, strict=True) if tail]
            tails = [tail for tail in short if tail]
            sides = [_states(donor, processor, batch, side, layer) for side in (whole, tails)] if batch else []
        if sides:
            total = total + (sides[0] - sides[1]).sum(0)
        count, done = count + len(batch), done + len(indices)
        if progress is not None:
            progress(done, len(questions), "steering")
    if count == 0:
        raise DataError(
            f"steer: {len(questions)} questions, and no answer with a chain of thought among them; raise "
            "max_new_tokens, or take contrast: prompts"
        )
    return (total / count).float()


def without_chain(processor: Any, answer: Sequence[int]) -> list[int]:
    """The tokens of an answer after its thinking; empty if it has no thinking, or nothing follows it."""
    decode = tokenizer_of(processor).decode
    if not without_reasoning(decode(answer)).strip():
        return []
    for end in reversed(range(1, len(answer))):
        if not without_reasoning(decode(answer[:end])).strip():
            return list(answer[end:])
    return []


def _states(
    donor: Any, processor: Any, questions: Sequence[Question], answers: Sequence[Sequence[int]] | None, layer: int
) -> Float[Tensor, "questions width"]:
    """Every question's state: of the prompt's last token, or the mean over the positions that predict its answer."""
    encoded = encode(processor, questions)
    pad = tokenizer_of(processor).pad_token_id or 0
    full, predicts = append_answers(encoded, answers or [[pad]] * len(questions), pad)
    states: list[Tensor] = []
    with threads_of(donor), hook_states(text_model(donor).layers[layer], states.append):
        donor(**to_device(full, donor.device, donor.dtype), use_cache=False)
    mask = predicts.to(states[0].device)[..., None]
    return ((states[0].double() * mask).sum(1) / mask.sum(1)).cpu()
