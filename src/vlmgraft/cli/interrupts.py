"""Ctrl-C and SIGTERM: the first stops after the piece in hand, the second ends the process at once.

The first raises `Interrupted` in the main thread, so that everything is left as after any error. Python tells the main
thread of a signal only between two instructions, and a decomposition is one of minutes; so the second is seen by a
thread of its own, which ends the process: what is on disk then is what a kill leaves, and can be resumed as that can.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 0.05
"""Seconds after which an interruption that a destructor swallowed is raised again."""

RESUMED = ("merge", "choose", "decompose", "tune", "evaluate", "compare", "knockout", "ranks", "sweep")
"""Commands that go on with --resume."""
KEPT = ("gates", "front")
"""Commands that go on by themselves."""


class Interrupted(BaseException):
    """The process was told to stop."""


def how_to_go_on(arguments: Sequence[str]) -> str:
    """The way on after an interruption, with the command to type; a token is left out, for HF_TOKEN to give."""
    secret = [number for number, word in enumerate(arguments) if word == "--token" or word.startswith("--token=")]
    secret += [number + 1 for number in secret if arguments[number] == "--token"]
    arguments = [word for number, word in enumerate(arguments) if number not in secret]
    words = [word for word in arguments if not word.startswith("-")]
    name = " ".join(words[:2]) if words[:1] == ["lab"] else " ".join(words[:1])
    again = shlex.join(["vlmgraft", *arguments])
    if name in RESUMED:
        return f"go on with: {again}" + ("" if "--resume" in arguments else " --resume")
    if name in KEPT:
        return f"what is done was kept; go on with: {again}"
    return f"nothing was finished; start again with: {again}"


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise `Interrupted` once, and end the process the second time.

    Signals that this process was started to ignore (as by `nohup`) stay ignored.
    """
    taken = [one for one in SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread() or not taken:
        yield
        return
    told = _Told()
    before = {one: signal.signal(one, told.raise_once) for one in (*taken, signal.SIGALRM)}
    hook, sys.unraisablehook = sys.unraisablehook, told.swallowed
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    wakeup = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(theirs, taken), daemon=True, name="signals").start()
    try:
        yield
    finally:
        told.over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(wakeup)
        for one, handler in before.items():
            signal.signal(one, handler)
        sys.unraisablehook = hook
        ours.close()


class _Told:
    """What the main thread knows of signals."""

    def __init__(self) -> None:
        self.times, self.over = 0, False
        self.before = sys.unraisablehook
        self.raised: weakref.ref[Interrupted] | None = None

    def raise_once(self, *_: Any) -> None:
        self.times += 1
        if self.times == 1:
            error = Interrupted()
            self.raised = weakref.ref(error, self.dropped)
            try:
                raise error
            finally:
                del error  # else its traceback keeps it, and it never goes

    def dropped(self, _: object) -> None:
        """The interruption is gone and nobody acted on it, as in a destructor, which lets nothing out: again."""
        if not self.over:
            self.times = 0
            signal.setitimer(signal.ITIMER_REAL, AGAIN)

    def swallowed(self, unraisable: Any) -> None:
        """Say nothing of an interruption in a destructor; others are told as ever."""
        if not issubclass(unraisable.exc_type, Interrupted):
            self.before(unraisable)


def _watch(signals: socket.socket, taken: Sequence[int]) -> None:
    """Count signals as they arrive; the second one ends the process, whatever the main thread is doing."""
    times = 0
    with signals:
        while arrived := signals.recv(1):
            if arrived[0] not in taken:
                continue
            times += 1
            if times == 1:
                os.write(2, b"\nvlmgraft: stopping after the piece in hand; once more ends it at once\n")
            else:
                os.write(2, b"\nvlmgraft: ended at once\n")
                os._exit(INTERRUPTED)
