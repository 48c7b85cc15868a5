"""The lab's exam as the analyses take it: any model in memory, the VLM's processor, right or wrong per item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmgraft.analysis.scores import Right
from vlmgraft.hf.data import Question
from vlmgraft.lab import world
from vlmgraft.lab.exam import Marks, draw_exam


class LabExam:
    """`sums` sums of handwritten digits and `each` questions of every kind of perception, of one split.

    prompts: questions of the calibration split, for what averages over prompts; `drifting`: of the test split's hands
    and another seed, for measuring drift.
    """

    reasoning: Sequence[str] = ("sum",)
    perception: Sequence[str] = world.PERCEPTION

    def __init__(
        self,
        processor: Any,
        *,
        seed: int = 0,
        split: world.Split = "validation",
        sums: int = 200,
        each: int = 50,
        glyphs: world.Glyphs = "handwriting",
    ) -> None:
        self.processor, self.seed, self.glyphs = processor, seed, glyphs
        self.exam = draw_exam(seed, split, {"sum": sums, **dict.fromkeys(world.PERCEPTION, each)}, glyphs=glyphs)
        self.label = f"lab, {split} split, seed {seed}, {sums} sums, {each} questions per perception task, {glyphs}"

    def __call__(self, model: Any) -> Right:
        """Right or wrong per item, by task."""
        return {task: values.tolist() for task, values in self.marks(model).right.items()}

    def marks(self, model: Any) -> Marks:
        """With the texts that were said."""
        return self.exam.mark(model, self.processor)

    def prompts(self, count: int = 128) -> list[Question]:
        """Unlabelled image questions of the calibration split."""
        tasks: dict[world.Task, int] = {"sum": count // 2, **dict.fromkeys(world.PERCEPTION, count // 8)}
        return _unlabelled(draw_exam(self.seed, "calibration", tasks, glyphs=self.glyphs).questions)

    def drifting(self, count: int = 192) -> list[Question]:
        """Unlabelled perception questions on which no gate is learned."""
        tasks: dict[world.Task, int] = dict.fromkeys(world.PERCEPTION, count // 4)
        return _unlabelled(draw_exam(self.seed + 1, "test", tasks, glyphs=self.glyphs).questions)


def _unlabelled(questions: Sequence[Question]) -> list[Question]:
    return [Question(question.question, question.images) for question in questions]
