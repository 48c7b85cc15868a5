"""Whether two expressions are equal, by math-verify in a process of its own.

Simplifying what a model wrote may take for ever, exhaust memory or crash the parser, and math-verify guards itself by
an alarm signal, which only a main thread can take. So it runs in a child process without its alarms: the child's
processor time and memory are limited by the operating system, and a child that dies is "undecided", then replaced.
The limit is on processor time, so a busy machine does not change verdicts.
"""

from __future__ import annotations

import atexit
import functools
import json
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any

SECONDS = 10
"""Processor time for one pair of expressions."""
MEMORY = 4 << 30
"""Address space of the child in bytes."""
PATIENCE = 120
"""Wall-clock seconds after which a child is killed where processor time cannot be limited."""
LONGEST = 300
_TOWER = re.compile(r"\d\s*\^\s*\{?\s*(?:\d{4,}|\d+\s*\^)")
"""Powers with more digits than the machine has room for; other slow expressions end by the limit."""


@dataclass(frozen=True)
class Comparison:
    """`same`: whether two expressions are equal, None when it could not be decided in time; `value`: the first one's
    number as a decimal text of 20 digits, None when it is no number."""

    same: bool | None
    value: str | None = None


@functools.lru_cache(maxsize=4096)
def compare(said: str, expected: str) -> Comparison:
    """Compare two expressions (LaTeX or plain, no dollars).

    Safe to call from any thread; identical questions are answered once.
    """
    if any(len(text) > LONGEST or _TOWER.search(text) for text in (said, expected)):
        return Comparison(None)
    return Comparison(*_worker.ask(said, expected))


class _Worker:
    """One child process, started at the first question and after every death."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()

    def ask(self, said: str, expected: str) -> tuple[bool | None, str | None]:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                command = [sys.executable, "-I", "-c", _CHILD, str(SECONDS), str(MEMORY), json.dumps(sys.path)]
                pipe = subprocess.PIPE
                self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            child = self.process
            timer = threading.Timer(PATIENCE, child.kill)
            timer.daemon = True
            timer.start()
            try:
                assert child.stdin is not None and child.stdout is not None
                child.stdin.write(json.dumps([said, expected]) + "\n")
                child.stdin.flush()
                answer = child.stdout.readline()
            except OSError:
                answer = ""
            finally:
                timer.cancel()
            if not answer:
                self.stop()
                return None, None
            same, value = json.loads(answer)
            return same, value

    def stop(self) -> None:
        """End the child, if there is one."""
        child, self.process = self.process, None
        if child is not None:
            child.kill()
            child.communicate()


_CHILD = """
import json, logging, sys
seconds, memory, sys.path[:] = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
try:
    import resource, signal
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, ValueError, OSError):
    signal = None
logging.disable(logging.CRITICAL)
from math_verify import LatexExtractionConfig, parse, verify
from sympy import N
for line in sys.stdin:
    if signal:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # no handler: the system ends the process
    try:
        said, expected = (
            parse("$" + text + "$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
            for text in json.loads(line)
        )
        same = bool(said and expected and verify(expected, said, timeout_seconds=None))
        number = said and not same and getattr(said[0], "is_real", False)
        value = str(N(said[0], 20)) if number else ""
        value = value if value.lstrip("-").replace(".", "", 1).isdigit() else None
    except Exception:
        same = value = None
    if signal:
        signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps([same, value]), flush=True)
"""

_worker: Any = _Worker()
atexit.register(_worker.stop)
