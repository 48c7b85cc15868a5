"""An exam from what `vlmgraft evaluate` reads, files, data sets and benchmarks, asked of a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmgraft.analysis.scores import Right
from vlmgraft.errors import DataError
from vlmgraft.evaluation.ask import ask
from vlmgraft.evaluation.engine import Sampling, TransformersEngine
from vlmgraft.evaluation.images import open_image
from vlmgraft.evaluation.items import Item, Suite, with_suffix
from vlmgraft.evaluation.run_records import Record
from vlmgraft.evaluation.summary import units
from vlmgraft.hf.data import Question

RIGHT = 0.5
"""What has a partial score, as in VQA, counts as right from here on."""


class SuiteExam:
    """Greedy answers to a suite, scored as an evaluation scores them; a task is a category of one kind.

    reasoning: the categories or tasks that count as reasoning, all others are perception; None: as the items' `kind`
    says. Items without a reference answer are left out.

    Raises:
        DataError: an item cannot be asked, or there is no reasoning or no perception among them.
    """

    def __init__(
        self,
        suite: Suite,
        processor: Any,
        *,
        reasoning: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 16,
    ) -> None:
        self.processor, self.batch_size = processor, batch_size
        self.sampling = Sampling(max_new_tokens or suite.max_new_tokens)
        kinds = {item.id: _kind(item, reasoning) for item in suite.items if item.answers}
        items = tuple(item for item in suite.items if kinds.get(item.id) in ("reasoning", "perception"))
        faulty = next((item for item in items if item.fault), None)
        if faulty is not None:
            raise DataError(f"{suite.name}, item {faulty.id}: {faulty.fault}; an analysis asks every item, so mend it")
        self.suite = Suite(suite.name, items, suite.suffix, suite.max_new_tokens)
        self.tasks = {item.id: f"{kinds[item.id]}: {_task(item)}" for item in items}
        found = list(dict.fromkeys(self.tasks.values()))
        self.reasoning: Sequence[str] = [task for task in found if task.startswith("reasoning:")]
        self.perception: Sequence[str] = [task for task in found if task.startswith("perception:")]
        if not self.reasoning or not self.perception:
            names = sorted({item.category or item.task for item in suite.items})
            raise DataError(
                f"{suite.name}: {len(self.reasoning)} tasks of reasoning and {len(self.perception)} of perception; "
                f"both are needed. Give data of both kinds, or say which of {', '.join(names[:12])} count as reasoning "
                "(--reasoning CATEGORY)"
            )
        self.label = f"{suite.name}: {len(items)} items, {self.suite.digest}, reasoning {list(reasoning or [])}"

    def __call__(self, model: Any) -> Right:
        """Right or wrong by task, per unit that an evaluation's score is the mean of: an item, all rotations of a
        question together, a problem with its steps."""
        engine = TransformersEngine(model, self.processor, self.sampling)
        records: dict[str, list[Record]] = {}
        for record in ask(engine, self.suite, batch_size=self.batch_size):
            records.setdefault(self.tasks[record.id], []).append(record)
        return {task: [score >= RIGHT for score in units(rows).values()] for task, rows in records.items()}

    def prompts(self, count: int) -> list[Question]:
        """The first questions as they are asked, without answers."""
        return [
            Question(
                with_suffix(item.question, self.suite.suffix), tuple(map(open_image, item.images)), choices=item.choices
            )
            for item in self.suite.items[:count]
        ]


def _task(item: Item) -> str:
    """The category, or the task where a problem's steps may be of several."""
    return item.task if item.pairing == "four_way" else item.category or item.task


def _kind(item: Item, reasoning: Sequence[str] | None) -> str:
    if reasoning is None:
        return item.kind
    return "reasoning" if item.category in reasoning or item.task in reasoning else "perception"
