"""Comparing expressions in a process of its own: limits, deaths, threads."""

from __future__ import annotations

import threading

import pytest

from vlmgraft.evaluation.answers import algebra
from vlmgraft.evaluation.answers.algebra import compare


@pytest.mark.parametrize(
    ("said", "expected", "same"),
    [("\\frac{1}{2}", "0.5", True), ("x+y", "y+x", True), ("x+y", "x-y", False), ("2^{10}", "1024", True)],
)
def test_expressions(said: str, expected: str, same: bool) -> None:
    assert compare(said, expected).same is same


def test_the_value_comes_along() -> None:
    assert str(compare("3\\pi", "9").value).startswith("9.42477796")
    assert compare("x", "9").value is None


def test_powers_of_powers_and_long_texts_are_not_tried() -> None:
    assert compare("9^{9^{9}}", "1").same is None and compare("1+" * 200 + "1", "201").same is None
    assert compare("2^{99999}", "1").same is None


def test_what_takes_too_long_is_stopped_and_the_next_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """(9!)!! would fill the memory; the system ends the child, and another one takes over."""
    worker = algebra._Worker()
    monkeypatch.setattr(algebra, "SECONDS", 1)
    try:
        assert worker.ask("((9!)!)!", "1") == (None, None)
        assert worker.ask("1+1", "2")[0] is True
    finally:
        worker.stop()


def test_a_child_that_dies_is_replaced() -> None:
    worker = algebra._Worker()
    try:
        assert worker.ask("x", "x")[0] is True
        assert worker.process is not None
        worker.process.kill()
        worker.process.wait()
        assert worker.ask("x", "x")[0] is True
    finally:
        worker.stop()


def test_threads_may_ask() -> None:
    """math-verify's own alarm signals would raise here."""
    found: list[bool | None] = []
    threads = [threading.Thread(target=lambda n=n: found.append(compare(f"{n}+x", f"x+{n}").same)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 6
