"""Question files: one JSON object per line, checked before any work starts.

A line holds `question`, and optionally `image` (a path or a list of paths, relative to the file), `answer`, `choices`,
`category`. Other keys are ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vlmgraft.errors import DataError


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
