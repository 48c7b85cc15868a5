"""Traces to fine-tune on: prompts with images and the answers to learn, checked before any work starts.

A row is one of

    {"image": "a.png", "question": "…", "reasoning": "…", "answer": "…"}     `reasoning` is optional: <think>…</think>
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "images": ["a.png"]}
    {"conversations": [{"from": "human", "value": "<image>…"}, {"from": "gpt", "value": "…"}], "images": […]}
    {"instruction": "…", "input": "…", "output": "…", "history": [["…", "…"]]}      or query and response, as ms-swift

in a file of JSON lines or a JSON list (images are paths relative to it), a parquet file, or a dataset of the hub
(`name`, `name:split`). Only the last assistant turn is learned; earlier turns are context. A part {"type": "image"} or
"<image>" in a text marks the place of an image; without marks, images come before the first user turn. A part may hold
the image itself, {"type": "image", "image": …}. A column `system` is the first turn. Video, audio, tools and special
tokens of a chat template are refused, because the model would learn something else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import dropwhile
from pathlib import Path
from typing import Any

from PIL import Image

from vlmgraft.data.images import check_picture, image_content, row_image
from vlmgraft.data.questions import MARK, check_columns, parts_of, pictures_of, renamed
from vlmgraft.data.sources import Row, read_rows, split_named
from vlmgraft.errors import DataError

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
ALPACA = {"instruction": "question", "output": "answer", "query": "question", "response": "answer"}
"""Columns of Alpaca's and ms-swift's rows → ours."""
UNREAD = ("video", "videos", "audio", "audios", "tools", "objects")
"""Unsupported columns that would change what is learned."""
FOREIGN_MARKS = ("<video>", "<audio>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
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
    """An image in the form that an image column of `datasets` accepts."""
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
            unreadable, or numbers of images and of their marks that differ.
    """
    rows, folder = _rows(str(source))
    check_columns(columns, {name for row in rows for name in row}, source)
    traces: list[Trace] = []
    for number, raw in enumerate(rows, start=1):
        if limit is not None and len(traces) >= limit:
            break
        where = f"{source}, row {number}"
        traces.append(_trace(renamed(raw, columns), folder, where))
    if not traces:
        raise DataError(f"{source}: holds no row to learn from")
    return Traces(tuple(traces), str(source))


def _rows(source: str) -> tuple[list[Row], Path]:
    """The raw rows, and the folder that relative image paths start from."""
    name, split = split_named(source)
    rows, folder = read_rows(name, split=split or "train", errors="strict")
    return rows, folder or Path()


def _bad(where: str, what: str) -> DataError:
    return DataError(f"{where}: {what}; mend the row, or drop it")


def _trace(row: Mapping[str, Any], folder: Path, where: str) -> Trace:
    for column in UNREAD:
        if row.get(column):
            raise _bad(where, f'column "{column}" is not read; only text and pictures are learned from')
    turns = _turns(row, where)
    held = [part.pop("image") for turn in turns for part in turn["content"] if part.get("image") is not None]
    given = pictures_of(row)
    if held and given:
        raise _bad(where, "has pictures in the parts of its turns and in a column; leave one of them")
    images = _images(held or given, folder, where)
    if turns[-1]["role"] != "assistant":
        raise _bad(where, "has no assistant turn at its end")
    if len(turns) == 1:
        raise _bad(where, "begins with the assistant, not with a user turn")
    *prompt, last = turns
    answer = "".join(part.get("text", "") for part in last["content"])
    if not answer.strip():
        raise _bad(where, "its last assistant turn is empty")
    places = sum(part["type"] == "image" for turn in prompt for part in turn["content"])
    if not places and images:
        first = next((turn for turn in prompt if turn["role"] == "user"), None)
        if first is None:
            raise _bad(where, "has images but no user turn to show them in")
        first["content"] = [{"type": "image"}] * len(images) + first["content"]
    elif places != len(images):
        raise _bad(where, f"{places} places for images, but {len(images)} images")
    return Trace(tuple(prompt), answer, tuple(images))


def first_user_turn(row: Row, images: list[Any], where: str) -> tuple[str, list[Any]]:
    """(text, images) of a chat's first user turn. The images are those in its parts, or as many of the row's `images`
    as the turn has marks, or all if the chat has no marks. Raises DataError if there is no user turn."""
    turns = [turn["content"] for turn in _turns(row, where) if turn["role"] == "user"]
    if not turns:
        raise _bad(where, "has no user turn")
    pieces = [MARK if part["type"] == "image" else part["text"] for part in turns[0]]
    behind = list(dropwhile(MARK.__eq__, pieces))  # leading images need no marks
    text = "".join(pieces) if MARK in behind else "\n".join(map(str.strip, behind))
    held = [part["image"] for part in turns[0] if part.get("image") is not None]
    places = [sum(part["type"] == "image" for part in turn) for turn in turns]
    return text, held or (images[: places[0]] if any(places) else images)


def _turns(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The turns of a row of any form, as role and parts."""
    chat = row.get("messages") or row.get("conversations")
    if chat is None:
        return _exchange(row, where)
    if not isinstance(chat, list) or not all(isinstance(turn, Mapping) for turn in chat):
        raise _bad(where, f"its chat must be a list of turns, got {chat!r:.80}")
    turns = []
    for turn in chat:
        role = str(turn.get("role", turn.get("from")))
        if role not in ROLES:
            raise _bad(where, f"role {role!r:.60} is none of {', '.join(ROLES)}")
        content = turn.get("content", turn.get("value")) or ""
        whole = isinstance(content, str) and ROLES[role] == "assistant"  # an answer may mention <image>
        parts = [{"type": "text", "text": content}] if whole else _parts(content, where)
        turns.append({"role": ROLES[role], "content": parts})
    return _checked(_with_system(row, turns, where), where)


def _with_system(row: Mapping[str, Any], turns: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The turns, preceded by the one in the column `system` if there is one."""
    system = row.get("system")
    if not system:
        return turns
    if not isinstance(system, str) or (turns and turns[0]["role"] == "system"):
        raise _bad(where, 'column "system" must be a text, and the only system turn')
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, *turns]


def _checked(turns: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The turns; raises DataError if a text holds special tokens of images or video, which processors would expand."""
    for turn in turns:
        for part in turn["content"]:
            mark = next((mark for mark in FOREIGN_MARKS if mark in part.get("text", "")), None)
            if mark:
                raise _bad(where, f"a turn of the {turn['role']} has {mark} in its text; write <image> for a picture")
    return turns


def _exchange(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Question and answer as a chat, after the turns of `history`; the reasoning comes before the answer."""
    row = {**{ours: row[theirs] for theirs, ours in ALPACA.items() if row.get(theirs) is not None}, **row}
    question, answer, thought = row.get("question"), row.get("answer"), row.get("reasoning")
    if row.get("input") and isinstance(question, str):
        question = f"{question}\n{row['input']}"
    if not isinstance(question, str) or not question.strip():
        keys = str(list(row))
        raise _bad(where, f'needs "question" and "answer", "messages" or "conversations", got {keys:.80}')
    if answer is None:
        raise _bad(where, "has no assistant turn: a question without an answer")
    if not isinstance(answer, str | int | float) or not isinstance(thought, str | None):
        raise _bad(where, f'"answer" and "reasoning" must be texts, got {[answer, thought]!r:.80}')
    learned = f"<think>{_padded(thought)}</think>{_padded(str(answer)).rstrip()}" if thought else str(answer)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise _bad(where, f'column "history" must be pairs of question and answer, got {history!r:.60}')
    turns = []
    for prompt, reply in [*history, (question, learned)]:
        turns.append({"role": "user", "content": _parts(prompt, where)})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": str(reply)}]})
    return _checked(_with_system(row, turns, where), where)


def _padded(text: str) -> str:
    """The text between line breaks if it has several lines, else between spaces."""
    gap = "\n" if "\n" in text.strip() else " "
    return f"{gap}{text.strip()}{gap}"


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    """A turn's content in parts of text and image."""
    if isinstance(content, str):
        return parts_of(content)
    kept = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise _bad(where, f"a part of a turn is neither text nor image: {part!r:.80}")
        if kind == "text":
            kept.append({"type": "text", "text": part["text"]})
        else:
            kept.append({"type": "image"} | ({"image": part["image"]} if part.get("image") is not None else {}))
    return kept


def _images(given: list[Any], folder: Path, where: str) -> list[Picture]:
    """The images of a row, validated now, so that an unreadable one is reported before training."""
    images: list[Picture] = []
    for value in given:
        image = row_image(value, folder, where)
        if not isinstance(image, Image.Image):
            check_picture(image, f"{where}: image {image}" if isinstance(image, Path) else f"{where}: its image")
        images.append(image)
    return images
