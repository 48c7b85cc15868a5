"""kill -9 at seeded moments of a command, and what must hold after each of them and after it was run to its end.

A moment is either the k-th change of the file system (a file opened for writing, a write, a flush, a rename, a removal
…; k drawn from those of an undisturbed run) or a time. Several kills hit the same folder before it may finish.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import Job, content

from vlmgraft.checkpoint.verify import verify
from vlmgraft.errors import CheckpointError
from vlmgraft.spectral.factor_store import FactorStore

KILLED = -9


class Warm:
    """The warm process as a context manager; `run` gives exit code, number of changes and seconds."""

    def __init__(self, *commands: str) -> None:
        self.commands = commands

    def __enter__(self) -> Warm:
        command = [sys.executable, str(Path(__file__).with_name("warm.py")), *self.commands]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()

    def run(self, arguments: tuple[str, ...], folder: Path, **moment: float) -> dict[str, Any]:
        """Run a command that writes in `folder`; moment: `at` or `seconds` of the kill. Its words go to folder.log."""
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        task = {"arguments": arguments, "under": str(folder), "log": f"{folder}.log", **moment}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@dataclass
class Tally:
    """What happened to one command: kills by kind, what was under the final name after them, runs to the end."""

    by_call: int = 0
    by_time: int = 0
    nothing: int = 0
    finished: int = 0
    completed: int = 0
    changes: int = 0
    moments: list[float] = field(default_factory=list)


@dataclass
class Victim:
    """A command that is killed. inputs: folders that it only reads."""

    name: str
    make: Callable[[Path], Job]
    inputs: tuple[Path, ...]
    folder: Path
    warm: Warm

    def __post_init__(self) -> None:
        self.tally, self.before = Tally(), digest(*self.inputs)
        whole = self.folder / "whole"
        ran = self.warm.run(self.make(whole).arguments, whole)
        assert ran["code"] == 0, Path(f"{whole}.log").read_text()
        self.tally.changes, self.seconds = ran["changes"], ran["seconds"]
        self.expected, self.names = content(self.make(whole).out), names(whole)

    @property
    def kills(self) -> int:
        """How many there were."""
        return self.tally.by_call + self.tally.by_time

    def chain(self, seed: int, kills: int, resume: bool) -> None:
        """Kill up to `kills` runs in one folder, at moments that `seed` gives, and let the next one finish."""
        folder, rng = self.folder / f"{seed}", random.Random(f"{self.name} {seed}")
        job = self.make(folder)
        for _ in range(kills):
            moment: dict[str, float] = {"at": rng.randint(1, self.tally.changes)}
            if rng.random() < 0.25:
                moment = {"seconds": rng.uniform(0, self.seconds)}
            ran = self.warm.run(job.resumed() if resume else job.arguments, folder, **moment)
            if ran["code"] != KILLED:
                break
            if "at" in moment:
                self.tally.by_call += 1
                self.tally.moments.append(moment["at"])
            else:
                self.tally.by_time += 1
            self.look(job)
        self.finish(job, folder, resume)
        shutil.rmtree(folder)

    def look(self, job: Job) -> None:
        """After a kill: the finished output or nothing, and the inputs as they were."""
        assert digest(*self.inputs) == self.before, "the inputs are as they were"
        if self.name == "decompose" and job.out.exists() and unfinished(job.out):
            self.tally.nothing += 1
        elif job.out.exists():
            assert content(job.out) == self.expected, "what is there is finished"
            self.tally.finished += 1
        else:
            self.tally.nothing += 1

    def finish(self, job: Job, folder: Path, resume: bool) -> None:
        """Run to the end: the result of an undisturbed run, and nothing else anywhere."""
        said = ""
        for arguments in (job.resumed(),) if resume else (job.arguments, job.resumed()):
            ran, said = self.warm.run(arguments, folder), Path(f"{folder}.log").read_text()
            if ran["code"] == 0:
                break
            assert ran["code"] == 2 and ("resume" in said or "exists" in said), said
        assert ran["code"] == 0, said
        found = content(job.out)
        assert found.keys() == self.expected.keys()
        other = [name for name in found if found[name] != self.expected[name]]
        assert not other, f"{self.name}, {folder}: {other} are not those of an undisturbed run"
        stray = names(folder) ^ self.names
        assert not stray, f"{self.name}, {folder}: {stray}"
        verified = verify(job.out)
        assert not verified.faults and not verified.unlisted and verified.files
        assert digest(*self.inputs) == self.before
        self.tally.completed += 1


def unfinished(out: Path) -> bool:
    """Whether a store of factors is refused by whoever wants to read it."""
    try:
        FactorStore(out).names  # noqa: B018
    except CheckpointError:
        return True
    return False


def names(folder: Path) -> set[str]:
    """Everything below a folder, by relative name."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def digest(*folders: Path) -> str:
    """Of the names and bytes of all files."""
    state = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                state.update(f"{path} {path.stat().st_size}\n".encode() + path.read_bytes())
    return state.hexdigest()
