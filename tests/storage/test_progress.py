"""Where work stands, in a line and in the log."""

from __future__ import annotations

import logging

import pytest

from vlmgraft.storage import progress
from vlmgraft.storage.progress import LogProgress, Meter, duration


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (250, "4 min 10 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rate_and_time_left_are_of_the_stage_at_hand(clock: list[float]) -> None:
    meter = Meter()
    assert meter.line() == "0.0 s: starting"
    clock[0] = 100.0
    meter(0, 50, "decompose")
    clock[0] = 110.0
    meter(20, 50, "decompose")
    assert meter.line() == "1 min 50 s: decompose: 20 of 50 (40 %), 2/s, 15.0 s left"
    clock[0] = 120.0
    meter(1, 10, "learn")
    clock[0] = 122.0
    assert meter.line() == "2 min 02 s: learn: 1 of 10 (10 %)"
    meter(2, 10, "learn")
    assert meter.line() == "2 min 02 s: learn: 2 of 10 (20 %), 0.5/s, 16.0 s left"


def test_the_log_has_a_line_per_interval(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    log = LogProgress(every=30)
    with caplog.at_level(logging.INFO, "vlmgraft"):
        for second in range(0, 100, 10):
            clock[0] = float(second)
            log(second, 100, "fold")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["30.0 s", "1 min 00 s", "1 min 30 s"]
