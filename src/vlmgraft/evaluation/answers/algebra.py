"""Whether two expressions are equal, decided by math-verify in a child process.

Simplifying a model's output may never end, exhaust memory or crash the parser. math-verify's own timeout is an alarm
signal, which works only in a main thread. It therefore runs in a child process without alarms, whose CPU time and
memory the operating system limits. If the child dies, the comparison is undecided and the child is replaced. The limit
is on CPU time, so a busy machine does not change verdicts.
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
"""CPU seconds for one pair of expressions."""
MEMORY = 4 << 30
"""Address space of the child in bytes."""
PATIENCE = 120
"""Wall-clock seconds after which a child is killed, for systems that cannot limit CPU time."""
LONGEST = 300
_TOWER = re.compile(r"\^ ?\{? ?\d{4,}|\d ?\^ ?\{? ?\d+ ?\^|\d{5,} ?\)? ?!|! ?\)? ?!|\( ?\( ?\( ?\( ?\( ?\( ?\(")
"""Powers and factorials whose digits may not fit into memory; other slow expressions end at the CPU limit."""


@dataclass(frozen=True)
class Equality:
    """`same`: whether two expressions are equal, None if undecided; `value`: the first expression's number as a decimal
    text of 20 digits, None if it is no number or the expressions are equal."""

    same: bool | None
    value: str | None = None


@functools.lru_cache(maxsize=4096)
def compare(answer: str, expected: str) -> Equality:
    """Compare two expressions (LaTeX or plain, no dollars).

    Safe to call from any thread; results are cached.
    """
    if any(len(text) > LONGEST or _TOWER.search(text) for text in (answer, expected)):
        return Equality(None)
    return Equality(*_worker.ask(answer, expected))


class _Worker:
    """One child process, started at the first comparison and again after it died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()

    def ask(self, answer: str, expected: str) -> tuple[bool | None, str | None]:
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
                child.stdin.write(json.dumps([answer, expected]) + "\n")
                child.stdin.flush()
                reply = child.stdout.readline()
            except OSError:
                reply = ""
            finally:
                timer.cancel()
            if not reply:
                self.stop()
                return None, None
            same, value = json.loads(reply)
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
from sympy import Abs, Basic, Float, N, Rational
from sympy.core.relational import Relational
def same_number(value, target):  # math-verify rounds to six decimals, which makes all small numbers one
    gap, size = (N(Abs(number), 15, maxn=400) for number in (value - target, value))
    return bool(gap <= size * (1e-6 if (value - target).has(Float) or value.has(Float) or target.has(Float) else 1e-60))
def same_at_points(value, target):  # 1/sqrt(n) and sqrt(1/n): equal wherever both are real
    symbols, equal = sorted(value.free_symbols, key=str), []
    for at in range(-4, 5):
        point = {symbol: Rational(14 * at + 3 * number + 5, 5) for number, symbol in enumerate(symbols)}
        sides = [N(side.subs(point), 30) for side in (value, target)]
        equal += [same_number(*sides)] if all(side.is_real for side in sides) else []
    return len(equal) > 3 and all(equal)
for line in sys.stdin:
    if signal:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # no handler: the system ends the process
    try:
        answers, targets = (
            parse("$" + text + "$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
            for text in json.loads(line)
        )
        options = {"allow_set_relation_comp": True, "timeout_seconds": None}  # x > 3 is the interval (3, oo)
        same = bool(answers and targets and verify(targets, answers, **options))
        number, target = (parsed[0] if parsed else None for parsed in (answers, targets))
        if isinstance(number, Basic) and isinstance(target, Basic) and not isinstance(number, Relational):
            if same and number.is_number and target.is_number:
                same = same_number(number, target)
            elif not (same or isinstance(target, Relational)) and number.free_symbols == target.free_symbols != set():
                same = bool(same_at_points(number, target))
        value = str(N(number, 20)) if number is not None and not same and getattr(number, "is_real", False) else ""
        value = value if value.lstrip("-").replace(".", "", 1).isdigit() else None
    except Exception:
        same = value = None
    if signal:
        signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps([same, value]), flush=True)
"""

_worker: Any = _Worker()
atexit.register(_worker.stop)
