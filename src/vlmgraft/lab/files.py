"""The lab's questions as the files that users write: JSON lines, with the images as PNG files beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlmgraft.hf.data import Question
from vlmgraft.lab.exam import Exam
from vlmgraft.records import write_rows


def save_questions(questions: Sequence[Question] | Exam, path: str | Path) -> Path:
    """Questions without their answers, for calibration, donor matching or drift; a finished file is left alone."""
    asked = questions.questions if isinstance(questions, Exam) else questions
    return _save([{"question": question.question} for question in asked], asked, Path(path))


def save_traces(exam: Exam, path: str | Path) -> Path:
    """Questions with the answers to learn, chain of thought included, as `vlmgraft tune` reads them."""
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
