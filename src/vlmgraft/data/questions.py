"""Question files: one JSON object per line, checked before any work starts.

A line holds `question`, and optionally `image` (a path or a list of paths, relative to the file), `answer`, `choices`,
`category`. Other keys are ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from vlmgraft.checkpoint.files import open_regular
from vlmgraft.data.images import ImageFile, check_picture, open_picture, read_image, shrunk, upright_rgb
from vlmgraft.errors import CheckpointError, DataError
from vlmgraft.storage.limits import MAX_LINE

MOST_CHOICES = 26
"""They are lettered from A to Z."""
HELD_BYTES = 1 << 29
"""Bytes of image files that `hold_images` keeps in memory; what is beyond is read again where it is needed."""


@dataclass(frozen=True)
class Question:
    """One prompt. Images are paths, files that were read (`hold_images`), or PIL images.

    Only the prompt is used for learning gates. max_pixels: larger images are shrunk to so many. where: file and line,
    for messages.
    """

    question: str
    images: tuple[Path | ImageFile | Image.Image, ...] = ()
    answer: str | None = None
    choices: tuple[str, ...] = ()
    category: str | None = None
    max_pixels: int | None = None
    where: str = field(default="", compare=False, repr=False)

    @property
    def name(self) -> str:
        """What messages call it: file and line, or how it begins."""
        return self.where or f"question {self.question[:60]!r}"

    @property
    def pixels(self) -> int:
        """Of all images as the model sees them; 0 for those whose files were not read."""
        sizes = [image.width * image.height for image in self.images if isinstance(image, Image.Image)]
        sizes += [image.pixels for image in self.images if isinstance(image, ImageFile)]
        return sum(min(size, self.max_pixels or size) for size in sizes)

    @property
    def prompt(self) -> str:
        """The text shown to the model: the question and, below it, lettered choices."""
        letters = (f"{chr(ord('A') + index)}. {choice}" for index, choice in enumerate(self.choices))
        return "\n".join([self.question, *letters])


def load_questions(
    path: str | Path, *, need_images: bool = False, limit: int | None = None, check_images: bool = True
) -> list[Question]:
    """Read a JSON-lines file; raises DataError with file, line and remedy.

    Image headers are opened now, so that an unreadable one is named before any work starts, unless `check_images` is
    False, for questions that `hold_images` reads.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such question file; it should hold one JSON object per line")
    questions = [
        _parse(row, path, f"{path}, line {number}", need_images, check_images)
        for number, row in islice(json_lines(path), limit)
    ]
    if not questions:
        raise DataError(f"{path}: holds no question")
    return questions


def json_lines(path: Path, errors: str = "strict") -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not empty, read one by one.

    errors: of decoding UTF-8, as `bytes.decode` has it.
    Raises:
        DataError: a line that is no JSON object, or longer than `MAX_LINE`, naming file and line.
    """
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
                if len(line) > MAX_LINE:
                    raise DataError(f"{path}, line {number}: has more than {MAX_LINE:,} bytes; name images by path")
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


def _parse(row: dict[str, Any], path: Path, where: str, need_images: bool, check_images: bool) -> Question:
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
    for image in images if check_images else ():
        check_picture(image, f"{where}: image {image}")
    answer, choices = row.get("answer"), row.get("choices") or []
    if not isinstance(choices, list) or len(choices) > MOST_CHOICES:
        raise DataError(f'{where}: "choices" must be a list of at most {MOST_CHOICES}, got {choices!r:.60}; shorten it')
    category = row.get("category")
    return Question(
        row["question"],
        images,
        None if answer is None else str(answer),
        tuple(str(choice) for choice in choices),
        None if category is None else str(category),
        where=where,
    )


def open_images(question: Question) -> list[Image.Image]:
    """The question's images in RGB, not larger than it allows; raises DataError naming the file."""
    opened = [
        upright_rgb(image)
        if isinstance(image, Image.Image)
        else open_picture(image.read() if isinstance(image, ImageFile) else image, f"image {image}")
        for image in question.images
    ]
    return opened if question.max_pixels is None else [shrunk(image, question.max_pixels) for image in opened]


def hold_images(questions: Sequence[Question], budget: int = HELD_BYTES) -> list[Question]:
    """The same questions with every image file read once: checked, digested, and its bytes kept up to `budget` in all.

    Raises DataError naming question and file.
    """
    held: list[Question] = []
    for question in questions:
        images: list[Path | ImageFile | Image.Image] = []
        for image in question.images:
            if isinstance(image, Path):
                image = read_image(image, f"{question.name}: image {image}", keep=True)
                budget -= len(image.data or b"")
                image = image if budget >= 0 else replace(image, data=None)
            images.append(image)
        held.append(replace(question, images=tuple(images)))
    return held


def questions_digest(questions: Sequence[Question]) -> str:
    """Fingerprint of prompts and of the bytes of their images, in order."""
    state = hashlib.sha256()
    for question in questions:
        state.update(repr((question.prompt, len(question.images), question.max_pixels)).encode())
        for image in question.images:
            if isinstance(image, Image.Image):
                state.update(repr((image.mode, image.size)).encode() + image.tobytes())
            elif isinstance(image, ImageFile):
                state.update(bytes.fromhex(image.digest))
            else:
                state.update(hashlib.sha256(image.read_bytes()).digest())
    return state.hexdigest()[:20]
