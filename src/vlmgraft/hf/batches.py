"""Questions about images as padded batches, and greedy answers to them.

Works with a VLM and its processor, and with a text LLM and its tokenizer (questions without images).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmgraft.data.questions import Question, blank_images, load_questions, open_images
from vlmgraft.errors import DataError, VlmgraftError
from vlmgraft.hf.modules import tokenizer_of
from vlmgraft.hf.placement import threads_of
from vlmgraft.hf.templates import prompt_text
from vlmgraft.storage.progress import Progress
from vlmgraft.storage.resources import is_memory, out_of_memory

__all__ = [
    "Batch",
    "Progress",
    "Question",
    "append_answers",
    "batches",
    "check_lengths",
    "cut",
    "encode",
    "generate_batch",
    "load_questions",
    "planned_lengths",
    "prompt_lengths",
    "text_positions",
    "to_device",
]

Batch = dict[str, Any]
PIXELS_PER_CHARACTER = 200
"""A token is four letters of text or, at Qwen2.5-VL's 28 × 28, 784 pixels."""
PROCESSOR_FAILURES = (
    LookupError,  # more places for images in the text than images
    RuntimeError,  # torch's own, of an image that becomes empty
    ValueError,  # an aspect ratio or a size that it does not take
)
"""What a processor raises over one question; nothing but its own call runs where they are caught."""


def encode(processor: Any, questions: Sequence[Question], *, pixels: bool = True) -> Batch:
    """Prompts through the chat template as one left-padded batch: input_ids, attention_mask, and the image tensors.

    pixels: False decodes no image: black images of the same sizes replace them, so that only the image tensors differ.
    All questions of a batch have images, or none has, as `batches` makes them. Raises DataError, CheckpointError.
    """
    tokenizer = tokenizer_of(processor)
    texts = [prompt_text(processor, question) for question in questions]
    images = [open_images(question) if pixels else blank_images(question) for question in questions]
    if any(images) and processor is tokenizer:
        raise DataError(
            f"{questions[0].name}: has an image, but the model reads text only: {tokenizer.name_or_path} has no "
            "processor that this transformers knows; of a vision-language model, take processor_config.json and "
            "preprocessor_config.json from the release of its weights, or save them again with transformers"
        )
    start = tokenizer.bos_token
    options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if start is not None and texts[0].startswith(start):
        options["add_special_tokens"] = False  # the template wrote it already
    if any(images):
        options["images"] = images
    return _processed(processor, questions, texts, options)


def _processed(processor: Any, questions: Sequence[Question], texts: list[str], options: Mapping[str, Any]) -> Batch:
    """The processor's output for texts and images; raises DataError naming the question that it refuses."""
    try:
        return dict(processor(text=texts, **options))
    except PROCESSOR_FAILURES as error:
        if is_memory(error):
            raise
        if len(questions) > 1:
            for question in questions:
                encode(processor, [question])
        raise DataError(
            f"{questions[0].name}: the processor cannot read it ({error!s:.200}); mend it, or drop it"
        ) from error


def batches(
    questions: Sequence[Question], batch_size: int, lengths: Sequence[int] = (), batch_tokens: int | None = None
) -> list[list[int]]:
    """Indices in batches of similar length, longest first (so that too little memory shows at once), images and plain
    text apart. Images count by their pixels, so that small and large ones do not share a batch.

    lengths: tokens of each question, if a batch may hold at most `batch_tokens`, padding included.
    """

    def cost(index: int) -> int:
        question = questions[index]
        return len(question.prompt) + 4000 * len(question.images) + question.pixels // PIXELS_PER_CHARACTER

    order = sorted(range(len(questions)), key=lambda index: (-cost(index), index))
    groups = ([i for i in order if questions[i].images], [i for i in order if not questions[i].images])
    lengths = lengths if batch_tokens else [0] * len(questions)
    return [batch for group in groups for batch in cut(group, lengths, batch_size, batch_tokens or 0)]


def cut(order: Sequence[int], lengths: Sequence[int], batch_size: int, batch_tokens: int) -> Iterator[list[int]]:
    """Consecutive batches of at most `batch_size` questions and `batch_tokens` padded tokens; a longer one is alone."""
    batch: list[int] = []
    for index in order:
        longest = max(lengths[i] for i in (*batch, index))
        if batch and (len(batch) == batch_size or longest * (len(batch) + 1) > batch_tokens):
            yield batch
            batch = []
        batch = [*batch, index]
    if batch:
        yield batch


def append_answers(batch: Mapping[str, Any], answers: Sequence[Sequence[int]], pad: int) -> tuple[Batch, torch.Tensor]:
    """A left-padded prompt batch with answers appended, padded on the right, and where the answers are predicted.

    Returns the batch, with every per-token tensor [batch, length] rebuilt, and a boolean mask [batch, length] that is
    true at the positions whose logits predict an answer token.
    """
    ids, keep = batch["input_ids"], batch["attention_mask"].bool()
    prompts = keep.sum(1).tolist()
    length = max(prompt + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    predicts = torch.zeros(len(ids), length, dtype=torch.bool)
    result = dict(batch)
    for key, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.shape[:2] != ids.shape or value.ndim != 2:
            continue
        fill = pad if key == "input_ids" else 0
        result[key] = torch.full((len(ids), length), fill, dtype=value.dtype)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            result[key][row, :prompt] = value[row][keep[row]]
            if key in ("input_ids", "attention_mask"):
                tail = torch.tensor(answer) if key == "input_ids" else 1
                result[key][row, prompt : prompt + len(answer)] = tail
            predicts[row, prompt - 1 : prompt + len(answer) - 1] = True
    return result, predicts


def text_positions(batch: Mapping[str, Any], placeholders: Collection[int] = ()) -> torch.Tensor:
    """Mask [batch, length]: where the next token is text of prompt or answer, neither padding nor in `placeholders`.

    For a right-padded batch, as `append_answers` makes it.
    """
    ids, keep = batch["input_ids"], batch["attention_mask"].bool()
    text = keep & ~torch.isin(ids, torch.tensor(sorted(placeholders), dtype=ids.dtype, device=ids.device))
    return torch.cat([text[:, 1:], torch.zeros_like(text[:, :1])], dim=1)


@torch.no_grad()
def generate_batch(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    max_new_tokens: int,
    options: Mapping[str, Any] | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Greedy answers to one batch as token ids, the end token included when it was reached; the prompts' lengths.
    `options` of `generate`, such as do_sample and temperature, replace the greedy ones.

    Raises DataError when prompt and answer are longer than the model reads, or it refuses them; VlmgraftError when
    memory runs out.
    """
    tokenizer = tokenizer_of(processor)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or [])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    settings = {"max_new_tokens": max_new_tokens, "pad_token_id": pad, **greedy, **(options or {})}
    doing = f"answering {len(questions)} questions at once"
    with out_of_memory(doing, "lower batch_size or max_new_tokens"):
        encoded = encode(processor, questions)
        lengths = encoded["attention_mask"].sum(1).tolist()
        _check_length(model.config, lengths, questions, max_new_tokens)
        batch = to_device(encoded, model.device, model.dtype)
        with threads_of(model):
            output = _generated(model, batch, settings, questions)
    answers = []
    for row in output[:, batch["input_ids"].shape[1] :].tolist():
        stop = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers, lengths


def _generated(model: Any, batch: Batch, settings: Mapping[str, Any], questions: Sequence[Question]) -> torch.Tensor:
    """What `generate` gives; DataError where it refuses a question, such as one whose text has a placeholder in it."""
    try:
        output: torch.Tensor = model.generate(**batch, **settings)
    except ValueError as error:
        if isinstance(error, VlmgraftError):
            raise
        others = f" or one of {len(questions) - 1} others" if len(questions) > 1 else ""
        raise DataError(
            f"{questions[0].name}{others}: the model cannot answer it ({error!s:.200}); mend it, or drop it"
        ) from error
    return output


def to_device(batch: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
    """The batch on a device; floating tensors (images) also in the model's dtype."""
    return {
        key: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in batch.items()
    }


def prompt_lengths(processor: Any, questions: Sequence[Question]) -> list[int]:
    """Tokens of every prompt, image tokens included; the images are not decoded."""
    lengths = [0] * len(questions)
    for indices in batches(questions, 8):
        mask = encode(processor, [questions[i] for i in indices], pixels=False)["attention_mask"]
        for index, length in zip(indices, mask.sum(1).tolist(), strict=True):
            lengths[index] = length
    return lengths


def planned_lengths(processor: Any, questions: Sequence[Question]) -> list[int]:
    """`prompt_lengths`, estimated to plan batches: the processor reads one question per combination of image sizes, and
    only the text of the others. A question that it refuses counts with its text alone."""
    lengths, expanded = [], dict[tuple[tuple[int, int], ...], int]()
    for question in questions:
        text = len(tokenizer_of(processor)(prompt_text(processor, question))["input_ids"])
        sizes = tuple(image.size for image in question.images if not isinstance(image, Path))
        if question.images and sizes not in expanded:
            try:
                expanded[sizes] = encode(processor, [question], pixels=False)["input_ids"].shape[1] - text
            except DataError:  # raised again when the question is asked
                expanded[sizes] = 0
        lengths.append(text + expanded.get(sizes, 0))
    return lengths


def check_lengths(config: Any, processor: Any, questions: Sequence[Question], max_new_tokens: int) -> list[int]:
    """The prompts' lengths; raises DataError naming a question that does not fit, with its images and an answer, in the
    model's context.

    Needs the config and the processor only, so it can run before any weight is read.
    """
    lengths = prompt_lengths(processor, questions)
    _check_length(config, lengths, questions, max_new_tokens)
    return lengths


def _check_length(config: Any, lengths: Sequence[int], questions: Sequence[Question], max_new_tokens: int) -> None:
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    for question, length in zip(questions, lengths, strict=True):
        if limit is not None and length + max_new_tokens > limit:
            raise DataError(
                f"{question.name}: prompt and answer need {length + max_new_tokens} tokens, the "
                f"model reads {limit}; shorten the question, shrink its images, or lower max_new_tokens"
            )
