"""Traces to fine-tune on: prompts with images and the answers to learn, checked before any work starts.

A row is one of

    {"image": "a.png", "question": "…", "reasoning": "…", "answer": "…"}     `reasoning` is optional: <think>…</think>
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "images": ["a.png"]}
    {"conversations": [{"from": "human", "value": "<image>…"}, {"from": "gpt", "value": "…"}], "images": […]}

in a file of JSON lines or a JSON list (images are paths relative to it), a parquet file, or a dataset of the hub
(`name`, `name:split`). What is learned is the last assistant turn; earlier ones are context. Images stand where a part
{"type": "image"} or "<image>" in a text says, else in front of the first user turn.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vlmgraft.errors import DataError

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
MARK = "<image>"
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
    """A picture as a column of images takes it."""
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    return str(image) if isinstance(image, Path) else image


def load_traces(source: str | Path, *, columns: Mapping[str, str] | None = None, limit: int | None = None) -> Traces:
    """Read traces from a JSON-lines or parquet file or a dataset of the hub; images are opened one by one later.

    Args:
        columns: our name → the file's name of a column, where they differ.
        limit: the first so many rows only.
    Raises:
        DataError: naming file, row and remedy: no assistant turn, an empty answer, an image that is missing or
            unreadable, or more or fewer images than places for them.
    """
    rows, folder = _rows(source)
    traces: list[Trace] = []
    for number, raw in enumerate(rows, start=1):
        if limit is not None and len(traces) >= limit:
            break
        where = f"{source}, row {number}"
        if not isinstance(raw, Mapping):
            raise DataError(f"{where}: {str(raw)[:80]!r} is not an object; every row must be one")
        row = {**raw, **{ours: raw.get(theirs) for ours, theirs in (columns or {}).items()}}
        traces.append(_trace(row, folder, where))
    if not traces:
        raise DataError(f"{source}: holds no row to learn from")
    return Traces(tuple(traces), str(source))


def _rows(source: str | Path) -> tuple[Iterator[Any], Path]:
    """The raw rows, and the folder that relative image paths start from."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".parquet") or path.exists():
        if not path.is_file():
            raise DataError(f"{path}: no such file; give JSON lines, a parquet file or a dataset of the hub")
        if path.suffix != ".parquet":
            return _json_lines(path), path.parent
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    name, _, split = str(source).partition(":")
    try:
        if path.suffix == ".parquet":
            data = load_dataset("parquet", data_files=str(path), split="train")
        else:
            data = load_dataset(name, split=split or "train")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{source}: cannot be loaded ({str(error).splitlines()[0]}); write a file, or name:split"
        ) from None
    for column, kind in data.features.items():
        inner = getattr(kind, "feature", None)
        if isinstance(kind, ImageFeature):
            data = data.cast_column(column, ImageFeature(decode=False))
        elif isinstance(inner, ImageFeature):
            data = data.cast_column(column, type(kind)(ImageFeature(decode=False)))
    return iter(data), path.parent


def _json_lines(path: Path) -> Iterator[Any]:
    """The rows of a file of JSON lines, or of one that is a single JSON list."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: not JSON ({error})") from None
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error.msg}); one object per line") from None


def _trace(row: Mapping[str, Any], folder: Path, where: str) -> Trace:
    images = _images(row, folder, where)
    turns = _turns(row, where)
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{where}: has no assistant turn at its end; there is nothing to learn from it")
    if len(turns) == 1:
        raise DataError(f"{where}: begins with the assistant; a user turn must ask first")
    answer = _text(turns[-1]["content"])
    if not answer.strip():
        raise DataError(f"{where}: its last assistant turn is empty")
    prompt = [{"role": turn["role"], "content": _parts(turn["content"], where)} for turn in turns[:-1]]
    places = sum(part["type"] == "image" for turn in prompt for part in turn["content"])
    if not places and images:
        first = next((turn for turn in prompt if turn["role"] == "user"), None)
        if first is None:
            raise DataError(f"{where}: has images but no user turn to show them in")
        first["content"] = [{"type": "image"}] * len(images) + first["content"]
    elif places != len(images):
        raise DataError(f"{where}: {places} places for images, but {len(images)} images; they must be equal")
    return Trace(tuple(prompt), answer, tuple(images))


def _turns(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The chat of any of the three forms, as role and content."""
    chat = row.get("messages") or row.get("conversations")
    if chat is None:
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not question.strip():
            raise DataError(f'{where}: needs "question" and "answer", "messages" or "conversations", got {list(row)}')
        if answer is None:
            raise DataError(f"{where}: has no assistant turn: a question without an answer; there is nothing to learn")
        thought = row.get("reasoning")
        said = f"<think>{_padded(str(thought))}</think>{_padded(str(answer)).rstrip()}" if thought else str(answer)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
    if not isinstance(chat, list) or not chat or not all(isinstance(turn, Mapping) for turn in chat):
        raise DataError(f"{where}: its chat must be a list of turns, got {str(chat)[:80]!r}")
    turns = []
    for turn in chat:
        role = ROLES.get(str(turn.get("role", turn.get("from"))))
        if role is None:
            raise DataError(f"{where}: role {turn.get('role', turn.get('from'))!r} is none of {', '.join(ROLES)}")
        turns.append({"role": role, "content": turn.get("content", turn.get("value")) or ""})
    return turns


def _padded(text: str) -> str:
    """Text set off by a new line when it has several, else by a space."""
    gap = "\n" if "\n" in text.strip() else " "
    return f"{gap}{text.strip()}{gap}"


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _parts(content: Any, where: str) -> list[dict[str, str]]:
    """A turn's content in parts of text and image."""
    if isinstance(content, str):
        parts: list[dict[str, str]] = []
        for index, text in enumerate(content.split(MARK)):
            parts += [{"type": "image"}] if index else []
            parts += [{"type": "text", "text": text}] if text.strip() else []
        return parts
    if not all(isinstance(part, Mapping) and part.get("type") in ("text", "image") for part in content):
        raise DataError(f"{where}: a part of a turn is neither text nor image: {str(content)[:80]!r}")
    kept = (
        {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]} for part in content
    )
    return list(kept)


def _images(row: Mapping[str, Any], folder: Path, where: str) -> list[Picture]:
    given = row.get("images", row.get("image"))
    given = [] if given is None else given if isinstance(given, list) else [given]
    images: list[Picture] = []
    for image in given:
        if isinstance(image, Mapping):  # a column of images, not decoded
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            image = folder / image
        if not isinstance(image, Path | bytes | Image.Image):
            raise DataError(f'{where}: "images" must be paths or pictures, got {image!r}')
        _check(image, where)
        images.append(image)
    return images


def _check(image: Picture, where: str) -> None:
    """Read the header, so that a bad image is named before training."""
    if isinstance(image, Image.Image):
        return
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            opened.verify()
    except FileNotFoundError:
        raise DataError(f"{where}: image {image!s} does not exist; paths are relative to the file") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{where}: an image cannot be read ({error}); replace it or drop the row") from None
