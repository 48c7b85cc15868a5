"""Questions about images, from any source that `read_rows` reads, checked before any work starts.

A row holds `question`, and optionally `image` or `images` (a path or a list of paths, relative to the file, or the
picture itself in parquet and data sets), `answer`, `choices`, `category`; or a chat whose first user turn is asked:
`conversations` as in LLaVA, or `messages`. "<image>" in a text marks the place of an image; without marks all images
come first. Rows with video or audio are refused, other keys ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from vlmgraft.data.chat import MARK, first_user_turn, parts_of
from vlmgraft.data.choices import Choices, letters, missing, number_text, read_choices
from vlmgraft.data.images import (
    ImageFile,
    check_picture,
    image_content,
    image_within,
    open_picture,
    read_image,
    row_image,
    shrunk,
    shrunk_size,
    upright_rgb,
)
from vlmgraft.data.lines import json_lines
from vlmgraft.errors import DataError

if TYPE_CHECKING:
    from vlmgraft.data.sources import Row

COLUMNS = ("question", "image", "images", "answer", "choices", "options", "category", "messages", "conversations")
"""The columns that are read."""
UNSEEN = ("video", "videos", "audio", "audios")
"""Unsupported columns that a question depends on."""
HELD_BYTES = 1 << 29
"""Bytes of image files that `hold_images` keeps in memory; further files are read again when they are needed."""


@dataclass(frozen=True)
class Question:
    """One prompt. Images are paths, files that were read (`hold_images`), or PIL images.

    Only the prompt is used for learning gates. max_pixels: larger images are scaled down to this number of pixels.
    where: file and line, for messages.
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
        """The question's name in messages: file and line, or its beginning."""
        return self.where or f"question {self.question[:60]!r}"

    @property
    def pixels(self) -> int:
        """Pixels of all images as the model sees them; images whose files were not read count as 0."""
        sizes = [image.width * image.height for image in self.images if isinstance(image, Image.Image)]
        sizes += [image.pixels for image in self.images if isinstance(image, ImageFile)]
        return sum(min(size, self.max_pixels or size) for size in sizes)

    @property
    def prompt(self) -> str:
        """The text shown to the model: the question and, below it, lettered choices; a blank one keeps its letter."""
        lettered = zip(letters(len(self.choices)), self.choices, strict=False)
        return "\n".join([self.question, *(f"{letter}. {choice}" for letter, choice in lettered if choice)])

    @property
    def parts(self) -> list[dict[str, str]]:
        """The prompt as parts of type "image" and "text": images at their marks, or all before the text if the numbers
        of marks and images differ."""
        if self.images and self.prompt.count(MARK) == len(self.images):
            return parts_of(self.prompt)
        return [{"type": "image"}] * len(self.images) + [{"type": "text", "text": self.prompt}]


def pictures_of(row: Row) -> list[Any]:
    """The images in a row's `image`, or in `images` if that is empty."""
    given = row.get("image") or row.get("images") or []
    return [one for one in (given if isinstance(given, list | tuple) else [given]) if one not in (None, "")]


def choices_of(row: Row, where: str) -> Choices:
    """The choices in a row's `choices`, or in `options` if that is empty; raises DataError naming the row."""
    name = "options" if missing(row.get("choices")) else "choices"
    try:
        return read_choices(row.get(name))
    except DataError as error:
        raise DataError(f'{where}: "{name}": {error}, or drop the row') from None


def load_questions(
    data: str | Path,
    *,
    need_images: bool = False,
    limit: int | None = None,
    check_images: bool = True,
    columns: Mapping[str, str] | None = None,
) -> list[Question]:
    """Load the questions of a file of JSON lines, or of any source that `read_rows` reads. NAME:SPLIT selects a data
    set's split; of a registered source, the split "calibration" is the default if there is one.

    Args:
        need_images: refuse questions without an image.
        limit: maximum number of questions, from the first.
        check_images: validate image headers now, so that an unreadable image is reported before any work starts; False
            for questions that `hold_images` will read. Images inside data sets are always validated.
        columns: one of `COLUMNS` → the source's name for it, where they differ.
    Raises:
        DataError: naming file, line or row, and remedy.
    """
    for name in columns or {}:
        if name not in COLUMNS:
            raise DataError(f"{data}: columns: unknown column {name!r}; it is one of {', '.join(COLUMNS)}")
    rows = list(islice(_rows(data, limit), limit))
    if not rows:
        raise DataError(f"{data}: holds no question")
    check_columns(columns, {name for _, row, _ in rows for name in row}, data)
    return [_parse(renamed(row, columns), folder, where, need_images, check_images) for where, row, folder in rows]


SAME = ({"image", "images"}, {"choices", "options"}, {"question", "messages", "conversations"})
"""Interchangeable columns: mapping one of them hides the others."""


def renamed(row: Row, columns: Mapping[str, str] | None) -> Row:
    """The row with columns under our names; columns: our name → the source's, or "none"."""
    if not columns:
        return row
    hidden = {name for group in SAME if group & columns.keys() for name in group}
    return {**row, **dict.fromkeys(hidden), **{ours: row.get(theirs) for ours, theirs in columns.items()}}


def check_columns(columns: Mapping[str, str] | None, seen: Collection[str], data: object) -> None:
    """Raise DataError for a mapped column that no row has."""
    for ours, theirs in (columns or {}).items():
        if theirs not in seen and theirs != "none":
            raise DataError(f"{data}: column {theirs!r} (for {ours}) is in no row; there are {', '.join(sorted(seen))}")


def _rows(data: str | Path, limit: int | None) -> Iterator[tuple[str, Row, Path]]:
    """Yield (name in messages, row, folder that its image paths are relative to)."""
    path = Path(data)
    if path.suffix == ".jsonl" or (path.is_file() and path.suffix not in (".json", ".parquet")):
        if not path.is_file():
            raise DataError(f"{path}: no such question file; it should hold one JSON object per line")
        yield from ((f"{path}, line {number}", row, path.parent) for number, row in json_lines(path))
        return
    from vlmgraft.data.sources import read_rows, registered_source, split_named

    name, split = split_named(str(data))
    registered = registered_source(name)
    if registered and split is None and "calibration" in registered[0].splits:
        split = "calibration"
    rows, folder = read_rows(name, split=split, errors="strict", count=limit)
    yield from ((f"{data}, row {number}", row, folder or Path()) for number, row in enumerate(rows, start=1))


def _parse(row: Row, folder: Path, where: str, need_images: bool, check_images: bool) -> Question:
    if unseen := next((column for column in UNSEEN if row.get(column)), None):
        raise DataError(f'{where}: column "{unseen}" is not shown; only images are. Drop the row')
    question, given = row.get("question"), pictures_of(row)
    if question is None and (row.get("messages") or row.get("conversations")):
        question, given = first_user_turn(row, given, where)
    if not isinstance(question, str) or not question.strip():
        raise DataError(
            f'{where}: needs a "question" that is a text, got {str(row)[:80]!r}; write one, or drop the line'
        )
    choices = choices_of(row, where).texts
    places = sum(text.count(MARK) for text in (question, *choices))
    if places not in (0, len(given)):
        raise DataError(f"{where}: {places} places for images, but {len(given)} images; mend the row, or drop it")
    images = tuple(_image(source, folder, where, check_images) for source in given)
    if need_images and not images:
        raise DataError(f'{where}: has no "image"; the calibration set must show images')
    answer, category = row.get("answer"), row.get("category")
    return Question(
        question,
        images,
        None if missing(answer) else number_text(answer),
        choices,
        None if missing(category) else str(category),
        where=where,
    )


def _image(given: Any, folder: Path, where: str, check: bool) -> Path | ImageFile | Image.Image:
    """A row's image: a path, a PIL image, or a reference to an image inside a data set."""
    image = row_image(given, folder, where)
    if isinstance(image, bytes):
        return image_within(image, lambda: cast(bytes, row_image(given, folder, where)), f"{where}, its image")
    if isinstance(image, Path) and check:
        check_picture(image, f"{where}: image {image}")
    return image


def open_images(question: Question) -> list[Image.Image]:
    """The question's images in RGB, with at most `max_pixels` pixels each; raises DataError naming the file."""
    opened = [
        upright_rgb(image)
        if isinstance(image, Image.Image)
        else open_picture(image.read() if isinstance(image, ImageFile) else image, f"image {image}")
        for image in question.images
    ]
    return opened if question.max_pixels is None else [shrunk(image, question.max_pixels) for image in opened]


def blank_images(question: Question) -> list[Image.Image]:
    """Black images of the sizes that `open_images` would return, without decoding the images."""
    read = [read_image(x, f"image {x}", keep=False) if isinstance(x, Path) else x for x in question.images]
    sizes = [upright_rgb(image).size if isinstance(image, Image.Image) else image.size for image in read]
    return [Image.new("RGB", shrunk_size(size, question.max_pixels or size[0] * size[1])) for size in sizes]


def hold_images(questions: Sequence[Question], budget: int = HELD_BYTES) -> list[Question]:
    """The questions with every image file read once: validated, hashed, and kept in memory up to `budget` bytes in all.

    Raises DataError naming question and file.
    """
    held: list[Question] = []
    for question in questions:
        images: list[Path | ImageFile | Image.Image] = []
        for image in question.images:
            if isinstance(image, Path):
                image = read_image(image, f"{question.name}: image {image}", keep=True)
            elif isinstance(image, ImageFile) and image.data is None and budget > 0:
                image = replace(image, data=image.read())
            if isinstance(image, ImageFile):
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
            state.update(image_content(image))
    return state.hexdigest()[:20]
