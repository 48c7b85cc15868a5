"""Question files: one JSON object per line, checked before any work starts.

A line holds `question`, and optionally `image` (a path or a list of paths, relative to the file), `answer`, `choices`,
`category`. Other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vlmgraft.checkpoint.files import open_regular
from vlmgraft.errors import CheckpointError, DataError
from vlmgraft.hf.pictures import check_picture, open_picture

LONGEST_LINE = 1 << 26
"""Bytes of a line: some carry a picture, none a film."""


@dataclass(frozen=True)
class Question:
    """One prompt. Images are paths, or PIL images in memory; only the prompt is used for learning gates.

    where: file and line, for messages.
    """

    question: str
    images: tuple[Path | Image.Image, ...] = ()
    answer: str | None = None
    choices: tuple[str, ...] = ()
    category: str | None = None
    where: str = field(default="", compare=False, repr=False)

    @property
    def name(self) -> str:
        """What messages call it: file and line, or how it begins."""
        return self.where or f"question {self.question[:60]!r}"

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
    for number, row in json_lines(path):
        if limit is not None and len(questions) >= limit:
            break
        questions.append(_parse(row, path, f"{path}, line {number}", need_images))
    if not questions:
        raise DataError(f"{path}: holds no question")
    return questions


def json_lines(path: Path, errors: str = "strict") -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not empty, read one by one.

    errors: of decoding UTF-8, as `bytes.decode` has it.
    Raises:
        DataError: a line that is no JSON object, or longer than `LONGEST_LINE`, naming file and line.
    """
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
                if len(line) > LONGEST_LINE:
                    raise DataError(f"{path}, line {number}: has more than {LONGEST_LINE:,} bytes; name images by path")
                if line.strip():
                    yield number, _object(line, f"{path}, line {number}", errors)
    except CheckpointError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file of JSON lines") from None


def parse(raw: bytes, errors: str = "strict") -> Any:
    """The value of a JSON text, with texts that UTF-8 can hold: half of an escaped surrogate pair is no character.

    Raises ValueError or RecursionError; with errors="replace" what is no character becomes a question mark.
    """
    value = json.loads(raw.decode("utf-8", errors))
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", errors)) if b"\\u" in raw else value


def _object(line: bytes, where: str, errors: str) -> dict[str, Any]:
    try:
        row = parse(line, errors)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error!s:.200}); every line must be one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object, got {line[:60]!r}")
    return row


def _parse(row: dict[str, Any], path: Path, where: str, need_images: bool) -> Question:
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise DataError(
            f'{where}: needs a "question" that is a text, got {str(row)[:80]!r}; write one, or drop the line'
        )
    given = row.get("image", row.get("images")) or []
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise DataError(
            f'{where}: "image" must be a path or a list of paths, got {given!r:.60}; write one, or drop the line'
        )
    if need_images and not given:
        raise DataError(f'{where}: has no "image"; the calibration set must show images')
    images = tuple(path.parent / name for name in given)
    for image in images:
        check_picture(image, f"{where}: image {image}")
    answer, choices = row.get("answer"), row.get("choices") or []
    if not isinstance(choices, list):
        raise DataError(f'{where}: "choices" must be a list, got {choices!r:.60}; write a list, or drop the line')
    category = row.get("category")
    return Question(
        row["question"],
        images,
        None if answer is None else str(answer),
        tuple(str(choice) for choice in choices),
        None if category is None else str(category),
        where,
    )


def open_images(question: Question) -> list[Image.Image]:
    """The question's images in RGB; raises DataError naming the file."""
    return [
        image.convert("RGB") if isinstance(image, Image.Image) else open_picture(image, f"image {image}")
        for image in question.images
    ]
