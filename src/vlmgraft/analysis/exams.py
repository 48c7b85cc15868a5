"""An exam from a question file: every line with an answer, its `category` saying what it tests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmgraft.analysis.scores import Right
from vlmgraft.errors import DataError
from vlmgraft.evaluation.answers import final_answer, same_answer
from vlmgraft.hf.data import Question, generate, load_questions


class FileExam:
    """Greedy answers to the questions of a JSON-lines file, compared with its `answer`s (see `evaluation/answers.py`).

    reasoning: the categories that count as reasoning; all others are perception. None: one named "reasoning".

    Raises:
        DataError: a question has no answer or no category, or one of the two kinds is empty.
    """

    def __init__(
        self,
        path: str | Path,
        processor: Any,
        *,
        reasoning: Sequence[str] | None = None,
        limit: int | None = None,
        max_new_tokens: int = 512,
        batch_size: int = 16,
    ) -> None:
        self.questions = load_questions(path, limit=limit)
        self.processor, self.max_new_tokens, self.batch_size = processor, max_new_tokens, batch_size
        for number, question in enumerate(self.questions, start=1):
            if question.answer is None or question.category is None:
                raise DataError(f'{path}, question {number}: an exam needs "answer" and "category" in every line')
        found = list(dict.fromkeys(str(question.category) for question in self.questions))
        wanted = ["reasoning"] if reasoning is None else list(reasoning)
        self.reasoning: Sequence[str] = [task for task in found if task in wanted]
        self.perception: Sequence[str] = [task for task in found if task not in wanted]
        if not self.reasoning or not self.perception:
            raise DataError(
                f"{path}: categories {', '.join(found)}, of which {', '.join(self.reasoning) or 'none'} count as "
                "reasoning; name some of them, and leave some for perception (--reasoning CATEGORY)"
            )
        digest = hashlib.sha256(repr([(q.prompt, q.answer, len(q.images)) for q in self.questions]).encode())
        self.label = f"{path}: {len(self.questions)} questions, {digest.hexdigest()[:12]}, reasoning {wanted}"

    def __call__(self, model: Any) -> Right:
        """Right or wrong per question, by category."""
        said = generate(model, self.processor, self.questions, self.max_new_tokens, self.batch_size)
        right: dict[str, list[bool]] = {}
        for question, text in zip(self.questions, said, strict=True):
            right.setdefault(str(question.category), []).append(_right(question, text))
        return right


def _right(question: Question, said: str) -> bool:
    """Whether the final answer is the expected one; for choices, its letter or its text."""
    final, expected = final_answer(said), str(question.answer)
    if same_answer(final, expected):
        return True
    letters = {chr(ord("A") + place): choice for place, choice in enumerate(question.choices)}
    named = next((letter for letter in letters if same_answer(final, letter)), None)
    return named is not None and same_answer(letters[named], expected)
