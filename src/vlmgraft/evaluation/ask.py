"""Asking a whole suite: batches are planned, records are written as they arrive, a resumed run asks only the rest."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmgraft.data.images import ImageFile
from vlmgraft.errors import DataError, VlmgraftError
from vlmgraft.evaluation.engine import Engine
from vlmgraft.evaluation.items import Item, Suite, image_size, open_image, with_suffix
from vlmgraft.evaluation.records import Record, fault_record, record_of
from vlmgraft.hf.batches import Question, batches, cut
from vlmgraft.storage.jsonl import append_rows
from vlmgraft.storage.progress import LogProgress, Progress

GIVE_UP = 16
"""Number of failures before the first answer after which `ask` stops: the questions are not the cause."""
BATCH_TOKENS = 65536
"""Prompt tokens of a batch, padding included: the default of FRISM's teacher."""
Store = Callable[[Sequence[Record]], None]


def ask(
    engine: Engine,
    suite: Suite,
    *,
    batch_size: int = 32,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    done: Sequence[Record] = (),
    log: Path | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Ask every item that is not in `done`; return all records in the order of the suite.

    Batches are planned over the whole suite, so a resumed run asks the same batches: the longest prompts first, of at
    most `batch_size` items and `batch_tokens` tokens (a longer prompt is asked alone). A batch that fails is halved
    until the failing item is isolated; running out of memory also halves the following batches. Sampling is seeded by
    `seed` and the items of the batch.

    Args:
        log: records are appended here after every batch.
    Raises:
        VlmgraftError: the first `GIVE_UP` questions all failed.
    """
    records = {record.id: record for record in done}
    run, progress = _Run(engine, suite, batch_size, seed, log, records), progress or LogProgress()
    shapes = [_shape(item, suite) for item in suite.items]
    for indices in plan(shapes, engine.lengths(shapes), batch_size, batch_tokens):
        waiting = [suite.items[index] for index in indices if suite.items[index].id not in records]
        for at in range(0, len(waiting), run.batch_size):
            run.batch(waiting[at : at + run.batch_size])
        progress(len(records), len(suite.items), "answers")
    return [records[item.id] for item in suite.items]


def plan(questions: Sequence[Question], lengths: Sequence[int], batch_size: int, batch_tokens: int) -> list[list[int]]:
    """Indices in batches, longest first, with images and plain text apart; without `lengths`, lengths are estimated."""
    if not lengths:
        return batches(questions, batch_size)
    order = sorted(range(len(questions)), key=lambda index: (-lengths[index], index))
    groups = ([i for i in order if questions[i].images], [i for i in order if not questions[i].images])
    return [batch for group in groups for batch in cut(group, lengths, batch_size, batch_tokens)]


class _Run:
    """The state of one `ask`: the records by id, and the batch size that fits."""

    def __init__(
        self, engine: Engine, suite: Suite, batch_size: int, seed: int, log: Path | None, records: dict[str, Record]
    ) -> None:
        self.engine, self.suite, self.batch_size, self.seed = engine, suite, batch_size, seed
        self.log, self.records = log, records
        self.failed, self.answered = 0, bool(records)

    def batch(self, items: Sequence[Item]) -> None:
        """Open the images, ask, and keep the records."""
        ready: list[tuple[Item, Question]] = []
        faulty = []
        for item in items:
            fault = item.fault or ("" if item.question.strip() else "the question is empty")
            try:
                if not fault:
                    ready.append((item, self._question(item)))
            except DataError as error:
                fault = str(error)
            if fault:
                faulty.append(fault_record(item, fault, failed=False))
        self._keep(faulty)
        if ready:
            self._ask(ready)

    def _ask(self, ready: Sequence[tuple[Item, Question]]) -> None:
        items = [item for item, _ in ready]
        seed = zlib.crc32(repr((self.seed, [item.id for item in items])).encode())
        fault = ""
        try:
            answers = self.engine.answer([question for _, question in ready], seed)
        except (VlmgraftError, torch.OutOfMemoryError) as error:
            fault = str(error) or repr(error)  # retried only after this block: the traceback holds the tensors
        if fault:
            self._failed(ready, fault)
            return
        self.answered = True
        self._keep(
            [
                record_of(
                    item,
                    answer.prompt,
                    answer.text,
                    tokens=answer.tokens,
                    prompt_tokens=answer.prompt_tokens,
                    cut=answer.cut,
                )
                for item, answer in zip(items, answers, strict=True)
            ]
        )

    def _failed(self, ready: Sequence[tuple[Item, Question]], fault: str) -> None:
        if len(ready) > 1:
            half = len(ready) // 2
            if "out of memory" in fault:
                self.batch_size = max(1, min(self.batch_size, half))
            self._ask(ready[:half])
            self._ask(ready[half:])
            return
        self.failed += 1
        if self.failed >= GIVE_UP and not self.answered:
            raise VlmgraftError(f"the first {self.failed} questions all failed, the last with: {fault}")
        self._keep([fault_record(ready[0][0], fault[:500], failed=True)])

    def _keep(self, records: Sequence[Record]) -> None:
        if records and self.log is not None:
            append_rows(self.log, records, flush=True)
        self.records.update({record.id: record for record in records})

    def _question(self, item: Item) -> Question:
        images: tuple[Any, ...] = tuple(open_image(source) for source in item.images)
        return Question(with_suffix(item.question, self.suite.suffix), images, choices=item.choices)


def _shape(item: Item, suite: Suite) -> Question:
    """The question as batches are planned: its text and the sizes of its images. An item with an unreadable image is
    planned without images, because it will not be asked."""
    try:
        images = tuple(ImageFile(Path("image"), "", image_size(source)) for source in item.images)
    except DataError:
        images = ()
    return Question(with_suffix(item.question, suite.suffix), images, choices=item.choices)
