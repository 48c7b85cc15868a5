"""One core per matrix: linear algebra whose bytes do not depend on the number of cores.

The last digits of LAPACK's results depend on the number of its threads. So a matrix is decomposed by one thread, and
the matrices are distributed over the cores: as fast where there are many, and the same bytes everywhere. torch's own
threads (MKL) are set through torch, numpy's (OpenBLAS) through threadpoolctl.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

from vlmgraft.storage.resources import free_memory

S = TypeVar("S")
T = TypeVar("T")
PER_THREAD = 4_000_000
COPIES = 10
"""Memory of a decomposition relative to the float32 matrix: float64 copies, Gram matrix, both bases."""


@contextmanager
def one_core_each() -> Iterator[None]:
    """Inside the context, torch and numpy use one thread per call, in every thread of this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def threads_for(parameters: int) -> Iterator[None]:
    """Inside the context, torch uses one thread per `PER_THREAD` parameters of a model, but no more than before.

    For such small products more threads only wait for each other, and on a busy machine for its busy core. A number
    from OMP_NUM_THREADS, which `--threads` sets, is left unchanged.
    """
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(before, parameters // PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def workers_for(elements: int) -> int:
    """How many matrices of `elements` elements to decompose at a time: one per core, within half of the free memory.
    The number affects only the time."""
    fit = free_memory() // 2 // max(1, 4 * COPIES * elements)
    return max(1, min(torch.get_num_threads(), fit))


def in_turn(work: Callable[[S], T], tasks: Iterable[S], workers: int) -> Iterator[tuple[S, T]]:
    """(task, result) in the order of the tasks, `workers` of them at a time; after an error no further task starts."""
    if workers == 1:
        yield from ((task, work(task)) for task in tasks)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from in_order(lambda task: (task, work(task)), tasks, pool, workers)


def in_order(work: Callable[[S], T], tasks: Iterable[S], pool: ThreadPoolExecutor, ahead: int) -> Iterator[T]:
    """Results of `work` in the order of the tasks, computing at most `ahead` of them in advance; after an error the
    tasks that have not started are dropped."""
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
