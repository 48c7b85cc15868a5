"""Passes over the merged tensors, for methods that must see all weights before they can merge any."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from vlmgraft.alignment import AlignedTensor
from vlmgraft.merging.pieces import WIDE, Inputs, chunks_of
from vlmgraft.merging.plan import CHUNK, lines_up
from vlmgraft.methods.base import TensorContext
from vlmgraft.methods.scratch import reused

S = TypeVar("S")
T = TypeVar("T")
AHEAD = 4
"""Tasks per thread that wait their turn: enough that no thread idles, few enough to stop soon after an error."""


def in_order(work: Callable[[S], T], tasks: Iterable[S], pool: ThreadPoolExecutor, threads: int) -> Iterator[T]:
    """Results of `work` in the order of the tasks; after an error the tasks that have not begun are dropped."""
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@dataclass(frozen=True)
class MergedPasses:
    """`methods.base.Passes` over the merged tensors, with the threads and the memory of the merge that follows."""

    inputs: Inputs
    pool: ThreadPoolExecutor
    threads: int

    def tensors(self) -> Iterator[tuple[TensorContext, Callable[[str], Tensor]]]:
        """Every merged tensor with its loader."""
        for tensor in self._merged():
            yield self.inputs.context(tensor), lambda key, tensor=tensor: self.inputs.one(tensor, key)

    def chunks(self) -> Iterator[tuple[TensorContext, Mapping[str, Tensor]]]:
        """Every chunk, copied out of the threads' memory."""
        return self.map(lambda pieces, _: {key: piece.clone() for key, piece in pieces.items()})

    def map(
        self, function: Callable[[Mapping[str, Tensor], TensorContext], T], *, sample: int = 1
    ) -> Iterator[tuple[TensorContext, T]]:
        """`function` of every chunk, in the threads, results in order."""

        def work(task: tuple[AlignedTensor, int, int]) -> list[tuple[TensorContext, T]]:
            tensor, start, stop = task
            lane = self.inputs.lanes.get()
            try:
                made = []
                for context, _, pieces in chunks_of(self.inputs, tensor, start, stop, lane, sample):
                    self.inputs.check(tensor, pieces)
                    with reused():
                        made.append((context, function(pieces, context)))
                return made
            finally:
                self.inputs.lanes.put(lane)

        tasks = (
            (tensor, start, stop)
            for tensor in self._merged()
            for start, stop in ranges(tensor, self.inputs.info(tensor).elements, WIDE * CHUNK)
        )
        for made in in_order(work, tasks, self.pool, self.threads):
            yield from made

    def _merged(self) -> Iterator[AlignedTensor]:
        return (tensor for tensor in self.inputs.alignment.merged if self.inputs.info(tensor).elements)


def ranges(tensor: AlignedTensor, elements: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut a tensor whose element order on disk is the VLM's into ranges; another one is a range of its own."""
    if not lines_up(tensor):
        step = elements
    for start in range(0, elements, step):
        yield start, min(elements, start + step)
