"""Work shared out among threads: in order, a bounded number at a time, and nothing begun after an error."""

from __future__ import annotations

import threading

import pytest
import torch

from vlmgraft.spectral import threads
from vlmgraft.spectral.threads import COPIES, in_turn, one_core_each, workers_for


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    assert list(in_turn(lambda n: n * n, range(10), workers)) == [(n, n * n) for n in range(10)]


def test_no_more_tasks_wait_than_there_are_workers() -> None:
    """Task n + workers + 1 is begun after the result of task n is taken: results do not pile up in memory."""
    begun: list[int] = []
    results = in_turn(lambda n: begun.append(n), range(100), 2)
    next(results)
    assert len(begun) <= 3
    results.close()
    assert len(begun) <= 3


def test_after_an_error_no_further_task_begins() -> None:
    begun, gate = [], threading.Event()

    def work(n: int) -> int:
        begun.append(n)
        if n == 0:
            raise ValueError("task 0")
        gate.wait(0.05)
        return n

    with pytest.raises(ValueError, match="task 0"):
        list(in_turn(work, range(50), 2))
    assert len(begun) <= 4


def test_torch_uses_one_thread_inside_and_as_many_as_before_after() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="stop"), one_core_each():
        assert torch.get_num_threads() == 1
        raise RuntimeError("stop")
    assert torch.get_num_threads() == before


def test_workers_fit_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "free_memory", lambda: 1000 * 4096)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 4)
    half = 1000 * 4096 // 2
    assert workers_for(half // (4 * COPIES * 2)) == 2
    assert workers_for(half // (4 * COPIES * 2) + 1) == 1
    assert workers_for(1) == 4 and workers_for(10**9) == 1


@pytest.mark.parametrize(("parameters", "expected"), [(830_000, 1), (8_000_000, 2), (10**10, 6)])
def test_a_small_model_takes_few_threads_unless_told(
    parameters: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: given[-1] if given else 6)
    monkeypatch.setattr(threads.torch, "set_num_threads", given.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with pytest.raises(KeyError), threads.threads_for(parameters):
        assert given == [expected]
        raise KeyError
    assert given == [expected, 6]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with threads.threads_for(parameters):
        assert given == [expected, 6]
