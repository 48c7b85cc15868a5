"""An engine that needs no model, and suites of small items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from vlmgraft.evaluation.engine import Answer
from vlmgraft.evaluation.items import Item, Suite
from vlmgraft.hf.batches import Question


class Scripted:
    """Says `say(question)`; remembers every question it was asked, and refuses batches above `room`."""

    name = "scripted"

    def __init__(self, say: Callable[[Question], str], room: int = 10**6) -> None:
        self.say, self.room = say, room
        self.asked: list[str] = []
        self.batches: list[int] = []

    def lengths(self, questions: Sequence[Question]) -> list[int]:
        return [len(question.question.split()) for question in questions]

    def answer(self, questions: Sequence[Question], seed: int) -> list[Answer]:
        if len(questions) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        texts = [self.say(question) for question in questions]
        self.asked += [question.question for question in questions]
        self.batches.append(len(questions))
        return [
            Answer(text, len(text.split()) + 1, False, question.prompt, 3)
            for text, question in zip(texts, questions, strict=True)
        ]


def _sums(count: int, **more: Any) -> Suite:
    items = [Item(str(n), f"what is {n} + {n} ?", answers=(str(2 * n),), task="sums", **more) for n in range(count)]
    return Suite("sums", tuple(items))


def _adds(question: Question) -> str:
    number = int(question.question.split()[2])
    return f"<think> {number} + {number} </think> {2 * number if number % 5 else 1}"


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted


@pytest.fixture
def sums() -> Callable[..., Suite]:
    """`sums(n)`: n questions "what is n + n ?"."""
    return _sums


@pytest.fixture
def adds() -> Callable[[Question], str]:
    """Answers them, every fifth wrongly."""
    return _adds
