"""The lab's exam: questions with images of one split, asked through the model's own processor and `generate`; the
registered source `lab`; and its questions saved in the file formats that users write."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmgraft.data.images import ImageFile
from vlmgraft.data.sources import RegisteredSource, Row
from vlmgraft.errors import DataError
from vlmgraft.evaluation.answers import final_answer
from vlmgraft.evaluation.ask import ask
from vlmgraft.evaluation.engine import Sampling, TransformersEngine
from vlmgraft.evaluation.intervals import Estimate, score_interval
from vlmgraft.evaluation.items import Item, Suite
from vlmgraft.hf.batches import Question
from vlmgraft.lab import world
from vlmgraft.storage.jsonl import write_rows

MAX_NEW_TOKENS = 28
BATCH_SIZE = 256
TEST: Mapping[str, int] = {"sum": 400, **dict.fromkeys(world.PERCEPTION, 150)}
"""Number of items per task in the test split's exam."""


@dataclass(frozen=True)
class ExamResult:
    """Right or wrong per item, by task; `outputs` the generated texts in the order of the exam."""

    right: Mapping[str, np.ndarray]
    outputs: tuple[str, ...]

    def of(self, *tasks: str) -> Estimate:
        """Mean accuracy over tasks with its 95 % interval."""
        return score_interval([self.right[task] for task in tasks])

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

    items: tuple[world.ExamItem, ...]
    questions: tuple[Question, ...]

    @property
    def suite(self) -> Suite:
        """The exam as `vlmgraft evaluate --data lab` asks it: scored by exact match, one task per kind of question."""
        items = [
            Item(
                id=str(at),
                question=question.question,
                images=tuple(image.path if isinstance(image, ImageFile) else image for image in question.images),
                answers=(final_answer(item.answer),),
                task=item.task,
                kind="perception" if item.task in world.PERCEPTION else "reasoning",
                metric="exact",
            )
            for at, (item, question) in enumerate(zip(self.items, self.questions, strict=True))
        ]
        return Suite("lab", tuple(items), max_new_tokens=MAX_NEW_TOKENS)

    def mark(self, model: Any, processor: Any) -> ExamResult:
        """Ask every question and score the answers."""
        engine = TransformersEngine(model, processor, Sampling(MAX_NEW_TOKENS))
        records = ask(engine, self.suite, batch_size=BATCH_SIZE)
        right: dict[str, list[bool]] = {}
        for record in records:
            right.setdefault(record.task, []).append(record.score == 1)
        marks = {task: np.array(values) for task, values in right.items()}
        return ExamResult(marks, tuple(record.output for record in records))


def draw_exam(
    seed: int,
    split: world.Split,
    counts: Mapping[str, int],
    *,
    as_image: bool = True,
    glyphs: world.Glyphs = "handwriting",
    draw: Callable[[np.random.Generator, str], world.ExamItem] = world.draw_item,
) -> Exam:
    """An exam of `counts` items per task, each made by `draw`, as images in the split's handwriting or as text."""
    stream = zlib.crc32(f"{split} {as_image}".encode())
    rng = np.random.default_rng([seed, stream])
    items = [draw(rng, task) for task, count in counts.items() for _ in range(count)]
    return Exam(tuple(items), tuple(_question(rng, item, split, as_image, glyphs) for item in items))


def _question(
    rng: np.random.Generator, item: world.ExamItem, split: world.Split, as_image: bool, glyphs: world.Glyphs
) -> Question:
    answer = final_answer(item.answer)
    if item.scene is None or not as_image:
        return Question(item.text_question, answer=answer, category=item.task)
    image = world.render(rng, item.scene, split, glyphs)
    return Question(item.question, (image,), answer=answer, category=item.task)


SPLITS: Mapping[str, tuple[world.Split, int, int]] = {
    "test": ("test", TEST["sum"], TEST["read"]),
    "validation": ("validation", 200, 50),
    "calibration": ("calibration", 64, 16),
    "divergence": ("test", 0, 48),
}
"""Splits of `--data lab` → (split of the handwriting, number of sums, questions per perception task). Prompts for the
KL are drawn from the test split with the next seed; no gates are learned on them."""


MOST = 20_000
"""Maximum number of questions drawn at once, each with its image."""


def draw_rows(argument: str, split: str, count: int | None) -> list[Row]:
    """The rows of `--data lab` or `lab:SEED`. Of `count` rows, each perception task gets an eighth, sums the rest.

    Raises:
        DataError: the argument is no seed, or `count` is larger than `MOST`.
    """
    if count is not None and count > MOST:
        raise DataError(f"lab: {count:,} questions are wanted, it draws {MOST:,} at most; ask for fewer")
    if argument and not argument.isdigit():
        raise DataError(f"lab:{argument}: write lab, or lab:SEED with a number")
    images, sums, each = SPLITS[split]
    if count is not None:
        each = max(1, count // (8 if sums else 4))
        sums = max(1, count - 4 * each) if sums else 0
    seed = int(argument or 0) + (split == "divergence")
    exam = draw_exam(seed, images, {**({"sum": sums} if sums else {}), **dict.fromkeys(world.PERCEPTION, each)})
    return [
        {
            "id": item.id,
            "question": item.question,
            "images": list(item.images),
            "answer": item.answers[0],
            "task": item.task,
            "kind": item.kind,
            "metric": item.metric,
        }
        for item in exam.suite.items
    ]


SOURCE = RegisteredSource(draw_rows, tuple(SPLITS), MAX_NEW_TOKENS, BATCH_SIZE)


def save_questions(questions: Sequence[Question] | Exam, path: str | Path) -> Path:
    """Save questions without their answers, for calibration, donor matching or the KL; an existing file is kept."""
    prompts = questions.questions if isinstance(questions, Exam) else questions
    return _save([{"question": question.question} for question in prompts], prompts, Path(path))


def save_traces(exam: Exam, path: str | Path) -> Path:
    """Save questions with the answers to learn, chain of thought included, as `vlmgraft tune` reads them."""
    rows = [
        {"question": question.question, "answer": item.answer}
        for item, question in zip(exam.items, exam.questions, strict=True)
    ]
    return _save(rows, exam.questions, Path(path))


def _save(rows: Sequence[dict[str, Any]], questions: Sequence[Question], path: Path) -> Path:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        for number, (row, question) in enumerate(zip(rows, questions, strict=True)):
            for image in question.images:
                if isinstance(image, Image.Image):
                    row["image"] = f"{path.stem}-{number:04d}.png"
                    image.save(path.parent / row["image"])
        write_rows(path, rows)
    return path
