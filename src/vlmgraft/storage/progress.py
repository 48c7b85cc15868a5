"""Progress of long work: by calls of a `Progress`, and in the log of `vlmgraft`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""progress(done, total, label): called after each unit of work, in the process that does it."""

EVERY = 30.0
"""Seconds between two lines if progress is logged and not drawn."""
LOG = logging.getLogger("vlmgraft")


def duration(seconds: float) -> str:
    """A duration in words, such as "3.2 s", "4 min 10 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Meter:
    """A `Progress` that records the state of the work and formats it as a line."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.done, self.total, self.label = 0, 0, "starting"
        self.stage = (0, self.began)
        """Units done, and the time, at the first report of the current stage."""

    def __call__(self, done: int, total: int, label: str) -> None:
        if total != self.total or done < self.done:
            self.stage = (done, time.monotonic())
        self.done, self.total, self.label = done, total, label

    def line(self) -> str:
        """The state, such as "1 min 00 s: q_proj: 12 of 196 (6 %), 0.4/s, 7 min 40 s left"."""
        now = time.monotonic()
        text = f"{duration(now - self.began)}: {self.label}"
        if not self.total:
            return text
        text += f": {self.done} of {self.total} ({100 * self.done / self.total:.0f} %)"
        first, since = self.stage
        rate = (self.done - first) / (now - since) if now > since else 0.0
        return f"{text}, {rate:.3g}/s, {duration((self.total - self.done) / rate)} left" if rate > 0 else text


class LogProgress(Meter):
    """Writes a line to the log of `vlmgraft` at most every `every` seconds, while the work reports."""

    def __init__(self, every: float = EVERY) -> None:
        super().__init__()
        self.every, self.next = every, self.began + every

    def __call__(self, done: int, total: int, label: str) -> None:
        super().__call__(done, total, label)
        now = time.monotonic()
        if now >= self.next:
            self.next = now + self.every
            LOG.info(self.line())
