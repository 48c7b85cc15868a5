"""A process that has imported everything and runs commands in children of its own, so that a kill costs no import.

Reads one JSON line per command: `arguments`, `under` (the folder that the command may write in; its system temporary
folder is `under/tmp`), `at` (kill -9 before this change of a file system, counted from 1) or `seconds` (kill -9 after
so long). Answers with one line: the exit code (−9 if it was killed), the number of changes, and seconds.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from injected import Writes, counted

IMPORTS = (
    "vlmgraft.cli",
    "vlmgraft.distillation.learn",
    "vlmgraft.evaluation.evaluate",
    "vlmgraft.merging",
    "vlmgraft.pipeline",
    "vlmgraft.evaluation.ask",
    "vlmgraft.evaluation.engine",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
)
TRAINER = ("vlmgraft.finetuning.tune", "trl.trainer.sft_trainer")
"""Slow to import: only where `tune` is among the commands."""


@contextmanager
def changes(writes: Writes) -> Iterator[None]:
    """Beside what `counted` sees: names that are removed, exchanged or made by the system's own call."""
    before: list[tuple[Any, str, Any]] = []

    def wrap(owner: Any, name: str, wanted: Callable[..., bool] = lambda *_, **__: True) -> None:
        real = getattr(owner, name)
        before.append((owner, name, real))

        def call(path: Any, *args: Any, **options: Any) -> Any:
            if wanted(path, *args, **options):
                folder = options.get("dir_fd")
                place = path if folder is None else f"{Path(f'/proc/self/fd/{folder}').readlink()}/{os.fsdecode(path)}"
                writes(name, place)
            return real(path, *args, **options)

        setattr(owner, name, call)

    for name in ("unlink", "remove", "rmdir"):
        wrap(os, name)
    wrap(os, "open", lambda _, flags, *__, **___: bool(flags & os.O_CREAT))
    from vlmgraft.storage import publish

    wrap(publish, "_renameat2")
    try:
        with counted(writes):
            yield
    finally:
        for owner, name, real in reversed(before):
            setattr(owner, name, real)


def die(*_: object) -> None:
    """As a power cut to this process: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def run(task: dict[str, Any], report: int) -> None:
    """In the child: the command, counted."""
    from vlmgraft import cli

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # not outlive the server
    under = Path(task["under"])
    os.environ["TMPDIR"] = str(under / "tmp")
    writes = Writes(under, die if task.get("at") else None, task.get("at") or 1)
    sys.argv = ["vlmgraft", *task["arguments"]]
    code = 0
    try:
        with changes(writes):
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 70
    os.write(report, str(len(writes.seen)).encode())
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """One command after the other."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in IMPORTS + (TRAINER if "tune" in sys.argv else ()):
        __import__(name)
    for line in sys.stdin:
        task, began = json.loads(line), time.monotonic()
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run(task, writing)
        os.close(writing)
        if task.get("seconds") is not None:
            time.sleep(task["seconds"])
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with os.fdopen(reading, "rb") as pipe:
            count = int(pipe.read() or 0)
        answers.write(json.dumps({"code": code, "changes": count, "seconds": time.monotonic() - began}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
