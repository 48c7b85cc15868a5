"""The exam marks what is said: all right is 100 %, all wrong is 0 %, by task; splits and forms differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image

from vlmgraft.errors import DataError
from vlmgraft.evaluation.engine import Answer
from vlmgraft.hf.batches import Question
from vlmgraft.lab import exam as exam_module, world
from vlmgraft.lab.exam import Exam, draw_exam, draw_rows

COUNTS: dict[str, int] = {"sum": 6, **dict.fromkeys(world.PERCEPTION, 4)}


class Parrot:
    """An engine that says what it was told to say to each picture."""

    name = "parrot"

    def __init__(self, exam: Exam, said: Sequence[str]) -> None:
        pictures = [question.images[0].tobytes() for question in exam.questions]  # type: ignore[union-attr]
        self.said = dict(zip(pictures, said, strict=True))

    def lengths(self, questions: Sequence[Question]) -> list[int]:
        return [1] * len(questions)

    def answer(self, questions: Sequence[Question], seed: int) -> list[Answer]:
        texts = [self.said[question.images[0].tobytes()] for question in questions]  # type: ignore[union-attr]
        return [Answer(text, len(text.split()), False, "", 0) for text in texts]


def taken(exam: Exam, said: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The marks of a model that says `said`."""
    monkeypatch.setattr(exam_module, "TransformersEngine", lambda *_: Parrot(exam, said))
    return exam.mark(None, None)


def test_right_answers_get_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    exam = draw_exam(0, "test", COUNTS)
    marks = taken(exam, [item.answer for item in exam.items], monkeypatch)
    assert (marks.reasoning.mean, marks.perception.mean) == (1.0, 1.0)
    assert {task: len(right) for task, right in marks.right.items()} == COUNTS


def test_wrong_answers_get_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    exam = draw_exam(0, "test", COUNTS)
    marks = taken(exam, ["<think> 1 + 1 = 2 </think> 63"] * len(exam.items), monkeypatch)
    assert (marks.reasoning.mean, marks.perception.mean) == (0.0, 0.0)


def test_only_the_final_number_of_a_sum_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    exam = draw_exam(0, "test", {"sum": 4})
    totals = [item.answer.split()[-1] for item in exam.items]
    unfinished = f"<think> 1 + 2 = {totals[3]}"
    said = [totals[0], f"<think> 0 </think> {totals[1]}", f"<think> {totals[2]} </think> 63", unfinished]
    assert taken(exam, said, monkeypatch).right["sum"].tolist() == [True, True, False, False]


def test_an_exam_is_a_function_of_seed_split_and_form() -> None:
    def asked(*arguments: Any, **options: Any) -> list[str]:
        return [item.text_question for item in draw_exam(*arguments, {"sum": 10}, **options).items]

    drawn = [asked(0, "test"), asked(1, "test"), asked(0, "validation"), asked(0, "test", as_image=False)]
    assert len({tuple(one) for one in drawn}) == 4
    assert drawn[0] == asked(0, "test")


def test_image_form_shows_the_scene_and_text_form_tells_it() -> None:
    shown, told = (draw_exam(0, "test", {"read": 3}, as_image=form) for form in (True, False))
    for item, question in zip(shown.items, shown.questions, strict=True):
        assert isinstance(question.images[0], Image.Image)
        assert question.question == item.question and item.scene
        assert not set(question.question.split()) & set(world.COLOURS)
    for item, question in zip(told.items, told.questions, strict=True):
        assert not question.images and question.question == item.text_question


def test_more_questions_than_can_be_drawn_are_refused() -> None:
    with pytest.raises(DataError, match="20,000 at most"):
        draw_rows("", "test", 999_999_999)
