"""Ctrl-C and SIGTERM: the first stops after the current step, the second ends the process at once.

The first raises `Interrupted` in the main thread, so that cleanup runs as after any error. Python delivers a signal to
the main thread only between two instructions, and a decomposition is a single instruction of minutes. A separate thread
therefore handles the second signal and ends the process. The files are then as after a kill, and can be resumed.
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
"""Commands that continue with --resume."""
KEPT = ("gates", "front")
"""Commands that continue by themselves when they are run again."""


class Interrupted(BaseException):
    """The process received a signal to stop."""


def how_to_go_on(arguments: Sequence[str]) -> str:
    """How to continue after an interruption, with the command to type; a token is left out (HF_TOKEN can give it)."""
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
    state = _SignalState()
    before = {one: signal.signal(one, state.raise_once) for one in (*taken, signal.SIGALRM)}
    hook, sys.unraisablehook = sys.unraisablehook, state.swallowed
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    wakeup = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(theirs, taken), daemon=True, name="signals").start()
    try:
        yield
    finally:
        state.over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(wakeup)
        for one, handler in before.items():
            signal.signal(one, handler)
        sys.unraisablehook = hook
        ours.close()


class _SignalState:
    """Signals received so far, and the exception raised for the first of them."""

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
                del error  # else its traceback keeps it alive, and it is never dropped

    def dropped(self, _: object) -> None:
        """Raise the interruption again: its exception was freed unhandled, as when a destructor swallows it."""
        if not self.over:
            self.times = 0
            signal.setitimer(signal.ITIMER_REAL, AGAIN)

    def swallowed(self, unraisable: Any) -> None:
        """Do not report an interruption raised in a destructor; report other exceptions as before."""
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
