"""One core for each matrix: linear algebra whose bytes do not depend on how many cores there are.

LAPACK's results depend on the number of its threads, in their last digits. So a matrix is decomposed by one thread,
and the cores share out the matrices: as fast where there are many, and the same bytes everywhere. torch's own threads
(MKL) are set through torch, numpy's (OpenBLAS) through threadpoolctl.
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
"""Bytes that a decomposition takes, over those of the matrix in float32: float64 copies, Gram matrix, both bases."""


@contextmanager
def one_core_each() -> Iterator[None]:
    """Inside, torch and numpy use one thread for each call, in every thread of this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def threads_for(parameters: int) -> Iterator[None]:
    """Inside, torch uses one thread for every `PER_THREAD` parameters of a model, at most those that it had.

    More threads wait for each other on products so small, and on a busy machine for its busy core. What
    OMP_NUM_THREADS says, which `--threads` sets, is left alone.
    """
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(before, parameters // PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def workers_for(elements: int) -> int:
    """How many matrices of so many elements to decompose at a time: one per core, as far as half of the free memory
    goes. The number changes nothing but the time."""
    fit = free_memory() // 2 // max(1, 4 * COPIES * elements)
    return max(1, min(torch.get_num_threads(), fit))


def in_turn(work: Callable[[S], T], tasks: Iterable[S], workers: int) -> Iterator[tuple[S, T]]:
    """(task, result) in the order of the tasks, `workers` of them at a time; after an error no further one begins."""
    if workers == 1:
        yield from ((task, work(task)) for task in tasks)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from in_order(lambda task: (task, work(task)), tasks, pool, workers)


def in_order(work: Callable[[S], T], tasks: Iterable[S], pool: ThreadPoolExecutor, ahead: int) -> Iterator[T]:
    """Results of `work` in the order of the tasks, at most `ahead` of them made before they are asked for; after an
    error the tasks that have not begun are dropped."""
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
