"""Questions about images, as files and as padded batches, and greedy answers to them.

A question file has one JSON object per line: `question`, and optionally `image` (a path or a list of paths, relative
to the file), `answer`, `choices`, `category`. Other keys are ignored. Works with a VLM and its processor, and with a
text LLM and its tokenizer (questions without images).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from vlmgraft.errors import DataError, VlmgraftError
from vlmgraft.hf.models import tokenizer_of

Progress = Callable[[int, int, str], None]
Batch = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One prompt. Images are paths, or PIL images in memory; only the prompt is used for learning gates."""

    question: str
    images: tuple[Path | Image.Image, ...] = ()
    answer: str | None = None
    choices: tuple[str, ...] = ()
    category: str | None = None

    @property
    def prompt(self) -> str:
        """The text shown to the model: the question and, below it, lettered choices."""
        letters = (f"{chr(ord('A') + index)}. {choice}" for index, choice in enumerate(self.choices))
        return "\n".join([self.question, *letters])


def load_questions(path: str | Path, *, need_images: bool = False, limit: int | None = None) -> list[Question]:
    """Read a JSON-lines file; raises DataError with file, line and remedy.

    Image headers are opened now, so that an unreadable one is named before any work starts.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such question file; it should hold one JSON object per line")
    questions: list[Question] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip() and (limit is None or len(questions) < limit):
            questions.append(_parse(line, path, f"{path}, line {number}", need_images))
    if not questions:
        raise DataError(f"{path}: holds no question")
    return questions


def _parse(line: str, path: Path, where: str, need_images: bool) -> Question:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); every line must be one JSON object") from error
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
        raise DataError(f'{where}: needs a "question" that is a text, got {str(row)[:80]!r}')
    given = row.get("image", row.get("images")) or []
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise DataError(f'{where}: "image" must be a path or a list of paths, got {given!r}')
    if need_images and not given:
        raise DataError(f'{where}: has no "image"; the calibration set must show images')
    images = tuple(path.parent / name for name in given)
    for image in images:
        _check_image(image, where)
    answer, choices = row.get("answer"), row.get("choices") or []
    if not isinstance(choices, list):
        raise DataError(f'{where}: "choices" must be a list, got {choices!r}')
    category = row.get("category")
    return Question(
        row["question"],
        images,
        None if answer is None else str(answer),
        tuple(str(choice) for choice in choices),
        None if category is None else str(category),
    )


def _check_image(path: Path, where: str) -> None:
    try:
        with Image.open(path) as image:
            image.verify()
    except FileNotFoundError as error:
        raise DataError(f"{where}: image {path} does not exist; paths are relative to the question file") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{where}: image {path} cannot be read ({error}); replace it or drop the line") from error


def open_images(question: Question) -> list[Image.Image]:
    """The question's images in RGB; raises DataError naming the file."""
    images = []
    for image in question.images:
        try:
            images.append((image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise DataError(f"image {image} cannot be decoded ({error}); replace it") from error
    return images


def encode(processor: Any, questions: Sequence[Question]) -> Batch:
    """Prompts through the chat template as one left-padded batch: input_ids, attention_mask, and the image tensors.

    All questions of a batch have images, or none has: `batches` sees to it.
    """
    tokenizer = tokenizer_of(processor)
    texts, images = [], []
    for question in questions:
        parts: list[dict[str, str]] = [{"type": "image"} for _ in question.images]
        content = [*parts, {"type": "text", "text": question.prompt}] if processor is not tokenizer else question.prompt
        chat = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        images.append(open_images(question))
    if any(images) and processor is tokenizer:
        raise DataError(f"question {questions[0].question[:60]!r} has an image, but the model reads text only")
    start = tokenizer.bos_token
    options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if start is not None and texts[0].startswith(start):
        options["add_special_tokens"] = False  # the template wrote it already
    return dict(processor(text=texts, **({"images": images} if any(images) else {}), **options))


def batches(questions: Sequence[Question], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first (what does not fit in memory fails at once), images and
    plain text apart."""

    def cost(index: int) -> int:
        return len(questions[index].prompt) + 4000 * len(questions[index].images)

    order = sorted(range(len(questions)), key=lambda index: (-cost(index), index))
    groups = ([i for i in order if questions[i].images], [i for i in order if not questions[i].images])
    return [group[at : at + batch_size] for group in groups for at in range(0, len(group), batch_size)]


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


@torch.no_grad()
def generate_ids(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Greedy answers as token ids, in the order of the questions, the end token included when it was reached."""
    tokenizer = tokenizer_of(processor)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or [])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    answers: list[list[int]] = [[] for _ in questions]
    done = 0
    for indices in batches(questions, batch_size):
        batch = to_device(encode(processor, [questions[i] for i in indices]), model.device, model.dtype)
        _check_length(model, batch["input_ids"].shape[1] + max_new_tokens, questions[indices[0]])
        try:
            output = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
            )
        except torch.OutOfMemoryError as error:
            raise VlmgraftError(f"out of memory at batch size {len(indices)}: lower batch_size") from error
        for index, row in zip(indices, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            stop = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
            answers[index] = row[:stop]
        done += len(indices)
        if progress is not None:
            progress(done, len(questions), "answers")
    return answers


def generate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy answers as text without special tokens, in the order of the questions."""
    tokenizer = tokenizer_of(processor)
    rows = generate_ids(model, processor, questions, max_new_tokens, batch_size, progress)
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in rows]


def to_device(batch: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
    """The batch on a device; floating tensors (images) also in the model's dtype."""
    return {
        key: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in batch.items()
    }


def _check_length(model: Any, length: int, question: Question) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise DataError(
            f"question {question.question[:60]!r}: prompt and answer need {length} tokens, the model reads {limit}; "
            "shorten the question, shrink its images, or lower max_new_tokens"
        )
