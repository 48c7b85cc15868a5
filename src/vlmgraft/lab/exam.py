"""The lab's exam: questions with images of one split, asked through the model's own processor and `generate`."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmgraft.evaluation.answers import final_answer
from vlmgraft.evaluation.ask import ask
from vlmgraft.evaluation.engine import Sampling, TransformersEngine
from vlmgraft.evaluation.intervals import Estimate, bootstrap
from vlmgraft.evaluation.items import Item, Suite
from vlmgraft.hf.data import Question
from vlmgraft.lab import world

MAX_NEW_TOKENS = 28
BATCH_SIZE = 256
TEST: Mapping[world.Task, int] = {"sum": 400, **dict.fromkeys(world.PERCEPTION, 150)}
"""The test split's exam: how many items of each task."""


@dataclass(frozen=True)
class Marks:
    """Right or wrong per item, by task; `said` the generated texts in the order of the exam."""

    right: Mapping[str, np.ndarray]
    said: tuple[str, ...]

    def of(self, *tasks: str) -> Estimate:
        """Mean accuracy over tasks with its 95 % interval."""
        return bootstrap([self.right[task] for task in tasks])

    @property
    def reasoning(self) -> Estimate:
        """Sums of handwritten digits."""
        return self.of("sum")

    @property
    def perception(self) -> Estimate:
        """Colour, glyph, reading all glyphs, listing all colours: the mean of the four."""
        return self.of(*world.PERCEPTION)


@dataclass(frozen=True)
class Exam:
    """Items with the questions as they are asked."""

    items: tuple[world.Item, ...]
    questions: tuple[Question, ...]

    @property
    def suite(self) -> Suite:
        """The exam as `vlmgraft evaluate --data lab` asks it: exact answers, a task per kind of question."""
        items = [
            Item(
                id=str(at),
                question=question.question,
                images=question.images,
                answers=(final_answer(item.answer),),
                task=item.task,
                kind="perception" if item.task in world.PERCEPTION else "reasoning",
                metric="exact",
            )
            for at, (item, question) in enumerate(zip(self.items, self.questions, strict=True))
        ]
        return Suite("lab", tuple(items), max_new_tokens=MAX_NEW_TOKENS)

    def mark(self, model: Any, processor: Any) -> Marks:
        """Ask every question and score the answers."""
        engine = TransformersEngine(model, processor, Sampling(MAX_NEW_TOKENS))
        records = ask(engine, self.suite, batch_size=BATCH_SIZE)
        right: dict[str, list[bool]] = {}
        for record in records:
            right.setdefault(record.task, []).append(record.score == 1)
        marks = {task: np.array(values) for task, values in right.items()}
        return Marks(marks, tuple(record.output for record in records))


def draw_exam(
    seed: int,
    split: world.Split,
    counts: Mapping[world.Task, int],
    *,
    as_image: bool = True,
    glyphs: world.Glyphs = "handwriting",
) -> Exam:
    """An exam of `counts` items per task, with images of the split's handwriting, or told in text."""
    stream = zlib.crc32(f"{split} {as_image}".encode())
    rng = np.random.default_rng([seed, stream])
    items = [world.draw_item(rng, task) for task, count in counts.items() for _ in range(count)]
    return Exam(tuple(items), tuple(_question(rng, item, split, as_image, glyphs) for item in items))


def _question(
    rng: np.random.Generator, item: world.Item, split: world.Split, as_image: bool, glyphs: world.Glyphs
) -> Question:
    answer = final_answer(item.answer)
    if item.scene is None or not as_image:
        return Question(item.text_question, answer=answer, category=item.task)
    image = world.render(rng, item.scene, split, glyphs)
    return Question(item.question, (image,), answer=answer, category=item.task)
