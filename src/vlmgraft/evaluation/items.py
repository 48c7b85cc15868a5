"""Items, grouped in suites. Images are only referenced here, and opened when their question is asked.

Images are untrusted: a missing, corrupt or enormous one becomes a fault of its item, not a crash.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from PIL import Image

from vlmgraft.data.choices import letters
from vlmgraft.data.images import MAX_PIXELS, ImageSource, image_content, open_picture, picture_size, upright_rgb
from vlmgraft.errors import DataError
from vlmgraft.evaluation.answers.options import choices_within, expected_letters

Kind = Literal["reasoning", "perception", "other"]
GroupScore = Literal["", "all_right", "worst", "four_way", "pairs"]


@dataclass(frozen=True)
class Expected:
    """What an answer is compared with: reference answers, lettered choices, the number of decimals that suffice."""

    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    precision: int | None = None


@dataclass(frozen=True)
class Item:
    """One question with everything needed to ask and to score it.

    answers: references; an item without any is not scored. metric: a key of `METRICS`. group, part: the items that
    are scored together, and the item's place among them. fault: why the item cannot be asked, or "".
    """

    id: str
    question: str
    images: tuple[ImageSource, ...] = ()
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    task: str = "questions"
    kind: Kind = "other"
    metric: str = "auto"
    precision: int | None = None
    category: str = ""
    group: str = ""
    part: str = ""
    pairing: GroupScore = ""
    fault: str = ""

    @property
    def expected(self) -> Expected:
        """What the metric compares an answer with; missing choices are parsed from the question."""
        return Expected(self.answers, self.choices or choices_within(self.question), self.precision)

    @property
    def key(self) -> str:
        """A digest of question, choices and references: equal for the same item in two runs."""
        content = repr((self.question, self.choices, self.answers, len(self.images)))
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Suite:
    """Items of one or several tasks. `suffix` is written below every question, `max_new_tokens` is the length that
    answers need, `duplicates` counts the repeated ids in the source, which were renamed."""

    name: str
    items: tuple[Item, ...]
    suffix: str = ""
    max_new_tokens: int = 1024
    duplicates: int = 0

    @cached_property
    def digest(self) -> str:
        """A digest of all items in order with their images' contents, which a resumed run must reproduce."""
        state = hashlib.sha256(self.suffix.encode())
        for item in self.items:
            state.update(repr((item.key, replace(item, images=()))).encode())
            for image in item.images:
                try:
                    state.update(image_content(image))
                except DataError:  # the item cannot be asked; once it can, the run is another
                    state.update(b"unreadable")
        return state.hexdigest()[:16]


def unique(items: Sequence[Item]) -> tuple[tuple[Item, ...], int]:
    """The items with ids that are unique (`x`, `x#2`, …), and how many had to be renamed."""
    seen: Counter[str] = Counter()
    taken = {item.id for item in items}
    result, renamed = [], 0
    for item in items:
        seen[item.id] += 1
        name = item.id
        if seen[item.id] > 1:
            renamed += 1
            while name in taken:
                name = f"{item.id}#{seen[item.id]}"
                seen[item.id] += name in taken
            taken.add(name)
        result.append(item if name == item.id else replace(item, id=name))
    return tuple(result), renamed


def circular(items: Sequence[Item]) -> list[Item]:
    """Replace each item that has choices and a known answer by all rotations of its choices; all must be right."""
    result: list[Item] = []
    for item in items:
        answer = _answer_text(item)
        if answer is None:
            result.append(item)
            continue
        for at, turned in enumerate(rotations(item.choices)):
            letter = letters(len(turned))[(answer - at) % len(turned)]
            turn = replace(item, id=f"{item.id}/turn{at}", choices=turned, answers=(letter,))
            result.append(replace(turn, group=item.id, part=str(at), pairing="all_right"))
    return result


def _answer_text(item: Item) -> int | None:
    """The index of the only right choice; None without choices, or if there is not exactly one right choice."""
    if len(item.choices) < 2 or len(item.answers) != 1:
        return None
    picked = expected_letters(item.answers[0], item.choices)
    return letters(len(item.choices)).index(next(iter(picked))) if len(picked) == 1 else None


def merge_suites(suites: Sequence[Suite]) -> Suite:
    """Several suites as one; their suffixes are written into the questions."""
    if not suites:
        raise DataError("data: names nothing to ask; give a question file, a preset such as mathvista, or lab")
    if len(suites) == 1:
        return suites[0]
    items = [
        replace(item, id=f"{suite.name}/{item.id}", question=with_suffix(item.question, suite.suffix))
        for suite in suites
        for item in suite.items
    ]
    joined, renamed = unique(items)
    return Suite(
        "+".join(suite.name for suite in suites),
        joined,
        "",
        max(suite.max_new_tokens for suite in suites),
        renamed + sum(suite.duplicates for suite in suites),
    )


def with_suffix(question: str, suffix: str) -> str:
    """The question with the suffix on a line of its own."""
    return f"{question}\n{suffix}" if suffix and question.strip() else question


def rotations(choices: Sequence[str]) -> list[tuple[str, ...]]:
    """The choices in every rotation (MMBench's circular evaluation), the given order first."""
    return [tuple(choices[at:]) + tuple(choices[:at]) for at in range(len(choices))]


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height without decoding the image; raises DataError for an invalid header, as `open_image` does."""
    if callable(source) and not isinstance(source, Image.Image):
        source = source()
    if isinstance(source, Image.Image):
        return source.size
    return picture_size(source, "the image")


def open_image(source: ImageSource) -> Image.Image:
    """The image in RGB; raises DataError saying why it cannot be shown. Its size is checked before it is decoded."""
    if callable(source) and not isinstance(source, Image.Image):
        source = source()
    name = "/".join(source.parts[-2:]) if isinstance(source, Path) else "the image in the data"  # records are shared
    if isinstance(source, Image.Image):
        if source.width * source.height > MAX_PIXELS:
            raise DataError(f"{name}: enormous, {source.width}×{source.height} pixels; shrink it")
        return upright_rgb(source)
    if not isinstance(source, Path | bytes | bytearray):
        raise DataError(f"an image must be a path, bytes or a picture, got {type(source).__name__}")
    return open_picture(source, name)
