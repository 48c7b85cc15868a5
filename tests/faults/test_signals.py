"""SIGINT and SIGTERM at chosen writes of every command: exit code 130, no traceback, and the command that it names
goes on to the bytes of a run that nobody stopped."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from injected import Writes, at, counted
from jobs import EVERYWHERE, Job, Whole, content, unfinished

Jobs = dict[str, Callable[[Path], Job]]
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell lets what it runs in the background ignore SIGINT, as the commands then do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stopped_and_continued(name: str, share: float, number: int, whole: Whole, jobs: Jobs, run: Run, tmp: Path) -> None:
    """Stop a command at a share of its writes, read what it says, do as it says, and compare."""
    expected, total = whole(name, run)[0], len(whole(name, run)[1])
    job = jobs[name](tmp)
    with counted(at(max(1, round(share * total)), number)(tmp)):
        ran = run(*job.arguments)
    assert ran.code == 130, (ran.code, ran.err)
    assert "Traceback" not in ran.err
    assert unfinished(name, job.out)
    (said,) = [line for line in ran.err.splitlines() if line.startswith("vlmgraft: interrupted; ")]
    command = shlex.split(said[said.index(": vlmgraft ") + 2 :])
    assert command[1:] == list(job.resumed())
    kept = {path: path.stat().st_ino for path in tmp.rglob("*.safetensors")}
    ran = run(*command[1:])
    assert ran.code == 0, ran.err
    assert content(job.out) == expected
    finished = [path for path in kept if path.exists() and "partial" not in str(path)]
    assert all(path.stat().st_ino == kept[path] for path in finished if name in ("decompose", "gates"))
    assert not [path for path in tmp.iterdir() if path.name.startswith(".")], "nothing hidden stays"


def test_stopped_while_it_locks(small_jobs: Jobs, vlmgraft: Run, tmp_path: Path) -> None:
    """Whoever goes on in the same process, as in a notebook, is not locked out by what was stopped."""
    job = small_jobs["export"](tmp_path)
    with counted(Writes(tmp_path)) as writes:
        assert vlmgraft(*job.arguments).code == 0
    locking = [number for number, (_, path) in enumerate(writes.seen, 1) if path.name.endswith(".lock")]
    assert len(locking) > 1
    for number in locking:
        shutil.rmtree(job.out, ignore_errors=True)
        with counted(at(number, signal.SIGINT)(tmp_path)):
            assert vlmgraft(*job.arguments).code == 130
        ran = vlmgraft(*job.arguments)
        assert ran.code == 0, ran.err
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("name", "number"), [("merge", signal.SIGINT), ("evaluate", signal.SIGTERM)])
def test_stopped_and_continued(
    name: str, number: int, whole: Whole, small_jobs: Jobs, vlmgraft: Run, tmp_path: Path
) -> None:
    stopped_and_continued(name, 0.5, number, whole, small_jobs, vlmgraft, tmp_path)


PLACES = [
    *[("frism", share) for share in (0.2, 0.6)],
    *[
        (name, 0.6)
        for name in ("decompose", "gates", "front", "sweep", "tune", "export", "knockout", "ranks", "choose", "steer")
    ],
    *[(name, 0.8) for name in ("curvature", "guarantee")],
]
if EVERYWHERE:
    names = ("merge", "frism", "decompose", "gates", "front", "evaluate", "sweep", "tune", "export")
    PLACES = [(name, number / 20) for name in names for number in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), PLACES)
def test_stopped_anywhere_and_continued(
    name: str, share: float, whole: Whole, small_jobs: Jobs, vlmgraft: Run, tmp_path: Path
) -> None:
    number = signal.SIGTERM if share > 0.5 else signal.SIGINT
    stopped_and_continued(name, share, number, whole, small_jobs, vlmgraft, tmp_path)


def test_a_stopped_merge_goes_on_where_it_was(small_jobs: Jobs, vlmgraft: Run, tmp_path: Path) -> None:
    """Begun without --resume, stopped after most of the tensors: they are not written again."""
    job = small_jobs["merge"](tmp_path)
    with counted(at(90, signal.SIGINT)(tmp_path)):
        assert vlmgraft(*job.arguments).code == 130
    (partial,) = tmp_path.glob(".out.partial-*")
    done = len((partial / ".journal.jsonl").read_text().splitlines()) - 1
    assert done > 20
    with counted(Writes(tmp_path)) as writes:
        assert vlmgraft(*job.resumed()).code == 0
    total = len(json.loads((job.out / "receipt.json").read_text())["tensors"])
    assert sum(call == "pwrite" and path.suffix == ".safetensors" for call, path in writes.seen) < 90 - done < total


def test_without_resume_it_begins_anew(small_jobs: Jobs, vlmgraft: Run, tmp_path: Path) -> None:
    job = small_jobs["merge"](tmp_path)
    with counted(at(90, signal.SIGINT)(tmp_path)):
        assert vlmgraft(*job.arguments).code == 130
    with counted(Writes(tmp_path)) as writes:
        assert vlmgraft(*job.arguments).code == 0
    total = len(json.loads((job.out / "receipt.json").read_text())["tensors"])
    assert sum(call == "pwrite" and path.suffix == ".safetensors" for call, path in writes.seen) >= total


@pytest.mark.parametrize("where", ["destructor", "library"])
def test_an_interruption_that_is_dropped_is_not_lost(
    where: str, small_jobs: Jobs, vlmgraft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python drops what is raised in a destructor, and a library may catch everything; it is raised again."""

    class Dropped:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # the handler runs between two of these
                pass

    def merge(*_: Any, **__: Any) -> None:
        if where == "destructor":
            Dropped()
        else:
            with suppress(BaseException):
                os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
        pytest.fail("went on")

    monkeypatch.setattr("vlmgraft.pipeline.merge", merge)
    ran = vlmgraft(*small_jobs["merge"](tmp_path).arguments)
    assert ran.code == 130 and "interrupted" in ran.err


BUSY = """
import hashlib, sys
from vlmgraft import cli, pipeline

def merge(*_, **__):
    said = False
    while True:  # a signal that comes before the native code is reached must not end the test's wait
        try:
            if not said:
                said = True
                print("busy", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)  # no instruction of Python's for half an hour
        except BaseException:
            pass

pipeline.merge = merge
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_one_ends_it_at_once(number: int, small_jobs: Jobs, tmp_path: Path) -> None:
    """Also while the main thread is in native code that does not come back."""
    command = [sys.executable, "-c", BUSY, *small_jobs["merge"](tmp_path).arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "busy\n"
        process.send_signal(number)
        assert process.stderr.readline() == "\n" and "once more ends it" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert "ended at once" in process.stderr.read()


def test_after_the_handlers_everything_is_as_before(small_jobs: Jobs, vlmgraft: Run, tmp_path: Path) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    hook, wakeup = sys.unraisablehook, signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    vlmgraft(*small_jobs["merge"](tmp_path).arguments)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == before
    assert sys.unraisablehook is hook and signal.set_wakeup_fd(wakeup) == wakeup


IMPORTING = """
import os, runpy, signal, sys

class AtOnce:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, {before})
sys.meta_path.insert(0, AtOnce())
sys.argv = ["vlmgraft", "--version"]
runpy.run_module("vlmgraft", run_name="__main__", alter_sys=False)
"""


@pytest.mark.parametrize("module", ["vlmgraft.cli", "typer", "vlmgraft.cli.lab", "vlmgraft.cli.interrupts"])
def test_an_interruption_of_the_imports_is_130_without_a_traceback(module: str) -> None:
    code = IMPORTING.format(module=module, before="signal.default_int_handler")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (130, "\nvlmgraft: interrupted\n")


def test_imports_go_on_where_the_signal_is_ignored() -> None:
    code = IMPORTING.format(module="typer", before="signal.SIG_IGN")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ran.stdout.startswith("vlmgraft "), ran.stderr
