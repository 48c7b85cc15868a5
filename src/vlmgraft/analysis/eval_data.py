"""Questions for a model in memory: suites that `vlmgraft evaluate` reads, scored right or wrong per item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmgraft.alignment.select import select_layers
from vlmgraft.analysis.scores import Right
from vlmgraft.data.sources import registered_source
from vlmgraft.distillation.teacher import build_targets
from vlmgraft.errors import AlignmentError, DataError
from vlmgraft.evaluation.ask import ask
from vlmgraft.evaluation.engine import Sampling, TransformersEngine
from vlmgraft.evaluation.items import Item, Suite, merge_suites, open_image, with_suffix
from vlmgraft.evaluation.readers import distinct_tasks, load_suite
from vlmgraft.evaluation.records import Record
from vlmgraft.evaluation.summary import units
from vlmgraft.hf.batches import Question, load_questions
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.hf.placement import default_device, default_dtype
from vlmgraft.storage.listed import listed

RIGHT = 0.5
"""Partial scores, such as VQA's, count as right from this value on."""
KL_TOKENS = 64
PROMPTS = 128
"""Prompts that mean ablation averages over."""


class SuiteEvaluator:
    """Greedy answers to a suite, scored as an evaluation scores them; a task is a category of one kind.

    reasoning: the categories or tasks that count as reasoning, all others are perception; None: each item's `kind`
    decides. Items without a reference answer are left out.

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
        tasks = list(dict.fromkeys(self.tasks.values()))
        self.reasoning: Sequence[str] = [task for task in tasks if task.startswith("reasoning:")]
        self.perception: Sequence[str] = [task for task in tasks if task.startswith("perception:")]
        if not self.reasoning or not self.perception:
            names = sorted({item.category or item.task for item in suite.items})
            raise DataError(
                f"{suite.name}: {len(self.reasoning)} tasks of reasoning and {len(self.perception)} of perception; "
                f"both are needed. Give data of both kinds, or say which of {', '.join(names[:12])} count as reasoning "
                "(--reasoning CATEGORY)"
            )
        self.label = f"{suite.name}: {len(items)} items, {self.suite.digest}, reasoning {list(reasoning or [])}"
        self.label += f", at most {self.sampling.max_new_tokens} tokens"

    def part(self, index: int, of: int) -> SuiteEvaluator:
        """Every `of`-th item of each task, from item `index` on; raises DataError if a task has too few items."""
        counts: Counter[str] = Counter()
        items = []
        for item in self.suite.items:
            task = self.tasks[item.id]
            if counts[task] % of == index:
                items.append(item)
            counts[task] += 1
        few = next((task for task, count in counts.items() if count < of), None)
        if few is not None:
            raise DataError(f"{self.suite.name}, {few}: {counts[few]} items for {of} parts; give more questions")
        part = copy(self)
        part.suite = replace(self.suite, items=tuple(items))
        part.label = f"{self.label}, part {index + 1} of {of}"
        return part

    def __call__(self, model: Any) -> Right:
        """Right or wrong by task, one value per unit that an evaluation averages over: an item, all rotations of a
        question, or a problem with its steps."""
        engine = TransformersEngine(model, self.processor, self.sampling)
        records: dict[str, list[Record]] = {}
        for record in ask(engine, self.suite, batch_size=self.batch_size):
            records.setdefault(self.tasks[record.id], []).append(record)
        return {task: [score >= RIGHT for score in units(rows).values()] for task, rows in records.items()}


@dataclass(frozen=True)
class EvalData:
    """The questions of an analysis.

    data: one or several inputs of `vlmgraft evaluate`: registered sources (`lab`, `lab:SEED`), question files, data
    sets, benchmarks. reasoning: categories or tasks that count as reasoning, all others are perception; None: as the
    data says. samples: at most this many rows of each input. drift: a question file on whose answers the KL from the
    VLM is measured; None takes the split "divergence" of a registered source. max_new_tokens, batch_size: None takes
    the data's own value. split: of data that has splits.
    """

    data: tuple[str, ...] = ("lab",)
    reasoning: tuple[str, ...] | None = None
    samples: int | None = None
    drift: str | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(listed(self.data)))
        if self.reasoning is not None:
            object.__setattr__(self, "reasoning", tuple(listed(self.reasoning)))

    @property
    def questions_at_a_time(self) -> int:
        """batch_size; None takes the smallest of the registered sources' own, or 16."""
        sources = [source for data in self.data if (source := registered_source(data))]
        return self.batch_size or min((source.batch_size for source, _ in sources), default=16)

    def evaluator(self, processor: Any) -> SuiteEvaluator:
        """Read and check the questions; registered sources use the split "validation" by default. Raises DataError."""
        suites = [
            load_suite(data, split=self._split(data), limit=self.samples, task=task)
            for data, task in zip(self.data, distinct_tasks(self.data), strict=True)
        ]
        return SuiteEvaluator(
            merge_suites(suites),
            processor,
            reasoning=self.reasoning,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.questions_at_a_time,
        )

    def _split(self, data: str) -> str | None:
        registered = registered_source(data)
        if self.split is None and registered and "validation" in registered[0].splits:
            return "validation"
        return self.split

    def prompts(self, suite: Suite, count: int = PROMPTS) -> list[Question]:
        """Prompts to average over: of the split "calibration" where a source has it, else the first questions."""
        suites = self._suites("calibration", count)
        return as_questions(merge_suites(suites) if suites else suite, count)

    def kl_prompts(self) -> tuple[list[Question], int] | None:
        """The prompts of the KL and the length of their answers; None if there are none. Raises DataError."""
        if self.drift is not None:
            return load_questions(self.drift), KL_TOKENS
        suites = self._suites("divergence")
        return (as_questions(merge_suites(suites)), max(suite.max_new_tokens for suite in suites)) if suites else None

    def kl_from(self, model: Any, processor: Any, prompts: Sequence[Question], length: int) -> Callable[[Any], float]:
        """A function that measures a model's KL from this one on answers of at most `length` tokens, nats per token."""
        teacher = (model, processor)
        size = min(48, self.questions_at_a_time)
        return build_targets(teacher, teacher, prompts, max_new_tokens=length, batch_size=size).mean_kl

    def _suites(self, split: str, count: int | None = None) -> list[Suite]:
        registered = [(data, source[0]) for data in self.data if (source := registered_source(data))]
        return [load_suite(data, split=split, limit=count) for data, source in registered if split in source.splits]


def as_questions(suite: Suite, count: int | None = None) -> list[Question]:
    """The first `count` items as questions with the suite's suffix, without answers."""
    return [
        Question(with_suffix(item.question, suite.suffix), tuple(map(open_image, item.images)), choices=item.choices)
        for item in suite.items[:count]
    ]


def _task(item: Item) -> str:
    """The item's category; its task where the steps of one problem may have several categories."""
    return item.task if item.pairing == "four_way" else item.category or item.task


def _kind(item: Item, reasoning: Sequence[str] | None) -> str:
    if reasoning is None:
        return item.kind
    return "reasoning" if item.category in reasoning or item.task in reasoning else "perception"


def open_vlm(path: str | Path) -> tuple[Any, Any]:
    """Load a VLM and its processor, with the device and dtype that `hf.placement` chooses."""
    device = default_device()
    return load_vlm(path, default_dtype(device), device), load_processor(path)


def layer_list(text: str | Sequence[int] | None, depth: int) -> list[int] | None:
    """Layer numbers from a recipe's notation ("3", "0-5" or numbers); None for None and "all". Raises DataError."""
    if text is None or text == "all":
        return None
    try:
        return sorted(select_layers(text, depth))
    except AlignmentError as error:
        raise DataError(f"--layers {text!r:.120}: {error}") from None
