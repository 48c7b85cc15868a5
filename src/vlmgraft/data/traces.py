"""Traces to fine-tune on: prompts with images and the answers to learn, checked before any work starts.

A row is one of

    {"image": "a.png", "question": "…", "reasoning": "…", "answer": "…"}     `reasoning` is optional: <think>…</think>
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "images": ["a.png"]}
    {"conversations": [{"from": "human", "value": "<image>…"}, {"from": "gpt", "value": "…"}], "images": […]}
    {"instruction": "…", "input": "…", "output": "…", "history": [["…", "…"]]}      or query and response, as ms-swift

in a file of JSON lines or a JSON list (images are paths relative to it), a parquet file, or a dataset of the hub
(`name`, `name:split`). `choices` or `options` of a question are shown below it, lettered, as `evaluate` shows them.
"reasoning_content", "reasoning" or "thinking" of an assistant turn is its reasoning. Only the last assistant turn is
learned; earlier turns are context. A part {"type": "image"} or "<image>" in a text marks the place of an image; without
marks, images come before the first user turn. A part may hold the image itself, {"type": "image", "image": …}. A column
`system` is the first turn. Video, audio, tools, calls of tools, weights other than 1 and special tokens of a chat
template are refused, because the model would learn something else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from vlmgraft.data.chat import bad_row, chat_turns, checked_turns, turn_parts, with_reasoning
from vlmgraft.data.choices import Choices, missing, number_text, refuse_counts_from_one
from vlmgraft.data.images import check_picture, image_content, open_picture, picture_mode, row_image, upright_rgb
from vlmgraft.data.questions import COLUMNS, Question, check_columns, choices_of, pictures_of, renamed
from vlmgraft.data.sources import Row, read_rows, split_named
from vlmgraft.errors import DataError

ALPACA = {"instruction": "question", "output": "answer", "query": "question", "response": "answer"}
"""Columns of Alpaca's and ms-swift's rows → ours."""
UNREAD = ("video", "videos", "audio", "audios", "tools", "objects")
"""Unsupported columns that would change what is learned."""
KNOWN = (*COLUMNS, "reasoning", *ALPACA, "input", "history", "system", *UNREAD)
"""Columns that can be mapped."""
INFINITE = (math.inf, -math.inf)
Picture = Path | Image.Image | bytes


@dataclass(frozen=True)
class Trace:
    """One example. prompt: chat turns in parts; answer: the text to learn; images: in the order of the parts."""

    prompt: tuple[Mapping[str, Any], ...]
    answer: str
    images: tuple[Picture, ...]


@dataclass(frozen=True)
class Traces:
    """Checked examples; `name` is where they came from."""

    traces: tuple[Trace, ...]
    name: str

    @cached_property
    def digest(self) -> str:
        """Identifies prompts, answers and the contents of their images, in order; raises DataError."""
        state = hashlib.sha256()
        for trace in self.traces:
            state.update(repr((trace.prompt, trace.answer, len(trace.images))).encode())
            for image in trace.images:
                state.update(image_content(image))
        return state.hexdigest()[:16]

    def dataset(self) -> Any:
        """A `datasets.Dataset` as TRL's trainer takes it: prompt, completion, and images that are decoded when read."""
        from datasets import Dataset, Features, Image, List, Value

        turns = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
        features = Features({"images": List(Image(mode="RGB")), "prompt": turns, "completion": turns})
        return Dataset.from_list([_row(trace) for trace in self.traces], features=features)


def _row(trace: Trace) -> dict[str, Any]:
    prompt = [{**turn, "content": [{"text": None, **part} for part in turn["content"]]} for turn in trace.prompt]
    completion = [{"role": "assistant", "content": [{"type": "text", "text": trace.answer}]}]
    return {"images": [_stored(image) for image in trace.images], "prompt": prompt, "completion": completion}


def _stored(image: Picture) -> Any:
    """An image in the form that an image column of `datasets` accepts; 16 bits per pixel, which it would clip, are
    scaled to 8 as everywhere."""
    mode = image.mode if isinstance(image, Image.Image) else picture_mode(image, "image")
    if mode.startswith("I;16"):
        return upright_rgb(image) if isinstance(image, Image.Image) else open_picture(image, "image")
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    return str(image) if isinstance(image, Path) else image


def load_traces(source: str | Path, *, columns: Mapping[str, str] | None = None, limit: int | None = None) -> Traces:
    """Read traces from a JSON-lines or parquet file or a dataset of the hub; images are opened one by one later.

    Args:
        columns: our name → the file's name of a column, where they differ.
        limit: maximum number of rows, from the first.
    Raises:
        DataError: naming file, row and remedy: no assistant turn, an empty answer, an image that is missing or
            unreadable, numbers of images and of their marks that differ, or anything that would not be learned.
    """
    for name in columns or {}:
        if name not in KNOWN:
            raise DataError(f"{source}: columns: unknown column {name!r}; it is one of {', '.join(KNOWN)}")
    rows, folder = _rows(str(source))
    check_columns(columns, {name for row in rows for name in row}, source)
    named = [(f"{source}, row {number}", _row_of(raw, columns)) for number, raw in enumerate(rows[:limit], start=1)]
    answers = [(choices_of(row, where), row.get("answer")) for where, row in named if not is_chat(row)]
    refuse_counts_from_one(answers, source)
    traces = tuple(_trace(row, folder, where) for where, row in named)
    if not traces:
        raise DataError(f"{source}: holds no row to learn from")
    return Traces(traces, str(source))


def _row_of(raw: Row, columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The row with columns under our names."""
    row = dict(renamed(raw, columns))
    given = {theirs: ours for theirs, ours in ALPACA.items() if not missing(row.get(theirs))}
    return row | {ours: row[theirs] for theirs, ours in given.items() if missing(row.get(ours))}


def _rows(source: str) -> tuple[list[Row], Path]:
    """The raw rows, and the folder that relative image paths start from."""
    name, split = split_named(source)
    rows, folder = read_rows(name, split=split or "train", errors="strict")
    return rows, folder or Path()


def _trace(row: Mapping[str, Any], folder: Path, where: str) -> Trace:
    for column in UNREAD:
        if row.get(column):
            raise bad_row(where, f'column "{column}" is not read; only text and pictures are learned from')
    turns = chat_turns(row, where) if is_chat(row) else _exchange(row, where)
    held = [part.pop("image") for turn in turns for part in turn["content"] if part.get("image") is not None]
    given = pictures_of(row)
    if held and given:
        raise bad_row(where, "has pictures in the parts of its turns and in a column; leave one of them")
    images = _images(held or given, folder, where)
    if not turns or turns[-1]["role"] != "assistant":
        raise bad_row(where, "has no assistant turn at its end")
    if len(turns) == 1:
        raise bad_row(where, "begins with the assistant, not with a user turn")
    *prompt, last = turns
    if any(part["type"] != "text" for part in last["content"]):
        raise bad_row(where, "its last assistant turn has an image, which cannot be learned")
    answer = "".join(part.get("text", "") for part in last["content"])
    if not answer.strip():
        raise bad_row(where, "its last assistant turn is empty")
    places = sum(part["type"] == "image" for turn in prompt for part in turn["content"])
    if not places and images:
        first = next((turn for turn in prompt if turn["role"] == "user"), None)
        if first is None:
            raise bad_row(where, "has images but no user turn to show them in")
        first["content"] = [{"type": "image"}] * len(images) + first["content"]
    elif places != len(images):
        raise bad_row(where, f"{places} places for images, but {len(images)} images")
    return Trace(tuple(prompt), answer, tuple(images))


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a row holds turns, not a question and its answer."""
    return bool(row.get("messages") or row.get("conversations"))


def _exchange(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Question and answer as a chat, after the turns of `history`; the reasoning comes before the answer."""
    question, answer, thought = row.get("question"), row.get("answer"), row.get("reasoning")
    if row.get("input") and isinstance(question, str):
        question = f"{question}\n{row['input']}"
    if not isinstance(question, str) or not question.strip():
        keys = str(list(row))
        raise bad_row(where, f'needs "question" and "answer", "messages" or "conversations", got {keys:.80}')
    if missing(answer):
        raise bad_row(where, "has no assistant turn: a question without an answer")
    thought = "" if missing(thought) else thought
    if not isinstance(answer, str | int | float) or not isinstance(thought, str) or answer in INFINITE:
        raise bad_row(where, f'"answer" and "reasoning" must be texts, got {[answer, thought]!r:.80}')
    choices = choices_of(row, where)
    learned = with_reasoning(thought, _learned(answer, choices, where), where)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        raise bad_row(where, f'column "history" must be pairs of texts, question and answer, got {history!r:.60}')
    turns = []
    for prompt, reply in [*history, (Question(question, choices=choices.texts).prompt, learned)]:
        turns.append({"role": "user", "content": turn_parts(prompt, where)})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
    return checked_turns(row, turns, where)


def _learned(answer: Any, choices: Choices, where: str) -> str:
    """The answer's text; of a number that names a choice, the choice's letter."""
    text = number_text(answer)
    if not text.strip().removeprefix("-").isdecimal():
        return text
    try:
        return choices.letter_of(answer) or text
    except DataError as error:
        raise bad_row(where, str(error)) from None


def _images(given: list[Any], folder: Path, where: str) -> list[Picture]:
    """The images of a row, validated now, so that an unreadable one is reported before training."""
    images: list[Picture] = []
    for value in given:
        image = row_image(value, folder, where)
        if not isinstance(image, Image.Image):
            check_picture(image, f"{where}: image {image}" if isinstance(image, Path) else f"{where}: its image")
        images.append(image)
    return images
