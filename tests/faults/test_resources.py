"""A full disk at chosen writes of every command, folders that cannot be written, clocks that jump, links for folders.

`VLMGRAFT_FAULTS=all pytest -m slow tests/faults/test_resources.py` fills the disk at every single write.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from injected import Writes, counted, full
from jobs import EVERYWHERE, Job, Whole, content, inputs_digest, unfinished

Jobs = dict[str, Callable[[Path], Job]]
Run = Callable[..., Any]


def full_at(number: int, name: str, whole: Whole, jobs: Jobs, run: Run, tmp: Path) -> None:
    """From one write on the disk is full; afterwards there is room again and the same command goes on."""
    expected, seen = whole(name, run)
    job = jobs[name](tmp)
    with counted(Writes(tmp, full, number)):
        ran = run(*job.arguments)
    where = f"{name}, write {number} of {len(seen)}: {seen[number - 1]}"
    assert ran.code == 2, (where, ran.code, ran.err)
    (said,) = [line for line in ran.err.splitlines() if line.startswith("vlmgraft: ")]
    assert str(tmp) in said and "cannot be written" in said and "make room" in said, (where, said)
    assert "Traceback" not in ran.err
    if number == len(seen) and seen[-1][0] == "fsync":  # of a folder: the result had its name already, and is whole
        assert content(job.out) == expected, where
        return
    assert unfinished(name, job.out), where
    ran = run(*job.resumed())
    assert ran.code == 0, (where, ran.err)
    assert content(job.out) == expected, where
    assert not [path for path in tmp.iterdir() if path.name.startswith(".")], where


def moments(name: str, seen: list[tuple[str, Path]], calls: tuple[str, ...]) -> list[int]:
    """The numbers of the middle write of each kind; of all writes, if all are wanted."""
    if EVERYWHERE:
        return list(range(1, len(seen) + 1))
    of = {kind: [number for number, (call, _) in enumerate(seen, 1) if call == kind] for kind in calls}
    assert all(of.values()), f"{name} makes no such call: {of}"
    return [numbers[len(numbers) // 2] for numbers in of.values()]


def check_full(name: str, calls: tuple[str, ...], whole: Whole, jobs: Jobs, run: Run, tmp: Path, trio: Path) -> None:
    before = inputs_digest(trio)
    for number in moments(name, whole(name, run)[1], calls):
        place = tmp / str(number)
        place.mkdir()
        full_at(number, name, whole, jobs, run, place)
        shutil.rmtree(place)
    assert inputs_digest(trio) == before


@pytest.mark.parametrize(
    ("name", "calls"), [("merge", ("posix_fallocate", "pwrite", "sendfile", "fsync")), ("evaluate", ("write",))]
)
def test_a_full_disk(
    name: str, calls: tuple[str, ...], whole: Whole, small_jobs: Jobs, vlmgraft: Run, tmp_path: Path, trio: Path
) -> None:
    check_full(name, calls, whole, small_jobs, vlmgraft, tmp_path, trio)


EVERY: dict[str, tuple[str, ...]] = {
    "merge": ("mkdir", "ftruncate", "open", "write", "replace"),
    "frism": ("write", "pwrite"),
    "decompose": ("write",),
    "gates": ("write",),
    "front": ("write",),
    "evaluate": ("open", "replace"),
    "sweep": ("write",),
    "tune": ("torch.save", "serialize_file"),
    "export": ("write",),
    "report": ("write",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_full_disk_in_every_command(
    name: str, whole: Whole, small_jobs: Jobs, vlmgraft: Run, tmp_path: Path, trio: Path
) -> None:
    check_full(name, EVERY[name], whole, small_jobs, vlmgraft, tmp_path, trio)


def mount_small(place: Path, size: int) -> str:
    """Mount a file system of so many bytes; why not, if it cannot be done here."""
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return "mounting needs root"
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.stderr if ran.returncode else ""


def test_a_real_file_system_that_is_too_small(whole: Whole, small_jobs: Jobs, vlmgraft: Run, tmp_path: Path) -> None:
    expected, _ = whole("merge", vlmgraft)
    job = small_jobs["merge"](tmp_path / "disk")
    if why := mount_small(tmp_path / "disk", 900_000):
        pytest.skip(f"no small file system here: {why}")
    try:
        ran = vlmgraft(*job.resumed())
        assert ran.code == 2 and "No space left" in ran.err and "make room" in ran.err
        assert not job.out.exists()
        subprocess.run(["mount", "-o", "remount,size=20m", str(tmp_path / "disk")], check=True)
        assert vlmgraft(*job.resumed()).code == 0
        assert content(job.out) == expected and [path.name for path in job.out.parent.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_files_may_not_be_so_large(whole: Whole, small_jobs: Jobs, vlmgraft: Run, tmp_path: Path) -> None:
    """A limit of the system on the size of files, which every system has; smaller shards fit."""
    job = small_jobs["merge"](tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        ran = vlmgraft(*job.arguments)
        assert ran.code == 2 and "model-00001" in ran.err and "output.shard_size" in ran.err
        assert not list(tmp_path.iterdir())
        assert vlmgraft(*job.arguments, "--set", "output.shard_size=250KB").code == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_where_a_folder_should_be(small_jobs: Jobs, vlmgraft: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("merge", "decompose", "gates", "evaluate", "export"):
        ran = vlmgraft(*small_jobs[name](tmp_path / "file").arguments)
        assert ran.code == 2 and str(tmp_path / "file") in ran.err, (name, ran.err)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["merge", "decompose", "evaluate"])
def test_a_folder_that_cannot_be_written(name: str, small_jobs: Jobs, vlmgraft: Run, tmp_path: Path) -> None:
    """By its permissions, which do not count for root; or by its file system, which only root can mount."""
    parent = tmp_path / "parent"
    if os.geteuid():
        parent.mkdir(mode=0o555)
    elif why := mount_small(parent, 1 << 20):
        pytest.skip(f"no read-only file system here: {why}")
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(parent)], check=True)
    try:
        ran = vlmgraft(*small_jobs[name](parent).arguments)
        assert ran.code == 2, ran.err
        assert "cannot be written" in ran.err and str(parent) in ran.err and "a folder that can be written" in ran.err
        assert not list(parent.iterdir())
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(parent)], check=True)


def test_nothing_is_decided_by_a_clock(
    whole: Whole, small_jobs: Jobs, vlmgraft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trio: Path
) -> None:
    """Stopped in a year to come, continued in 1970, inputs from the year 2100: the same bytes, and what was finished is
    still taken as finished."""
    expected, _ = whole("merge", vlmgraft)
    inputs = tmp_path / "inputs"
    shutil.copytree(trio, inputs)
    for number, file in enumerate(sorted(inputs.rglob("*.safetensors"))):
        os.utime(file, (4102444800 - number, 4102444800 - number))
    places = [word for key in ("vlm", "donor") for word in ("--set", f"{key}={inputs / key}")]
    job = small_jobs["merge"](tmp_path)
    words = (*job.arguments, *places, "--set", f"donor_base={inputs / 'base'}")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with counted(Writes(tmp_path, full, 100)):
        assert vlmgraft(*words, "--resume").code == 2
    monkeypatch.setattr(time, "time", lambda: 0.0)
    (partial,) = tmp_path.glob(".out.partial-*")
    for path in partial.iterdir():
        os.utime(path, (0, 0))
    with counted(Writes(tmp_path)) as writes:
        assert vlmgraft(*words, "--resume").code == 0
    assert sum(call == "pwrite" for call, _ in writes.seen) < 60, "what was finished is not written again"
    assert {name: one for name, one in content(job.out).items() if name.endswith("safetensors")} == {
        name: one for name, one in expected.items() if name.endswith("safetensors")
    }
    os.utime(job.out / "receipt.json", (0, 0))
    assert vlmgraft(*words, "--resume").code == 0, "a finished merge is known as such, though its inputs look newer"


def test_links_for_folders(whole: Whole, small_jobs: Jobs, vlmgraft: Run, tmp_path: Path, trio: Path) -> None:
    """Weights in the hub's cache, which itself is a link and holds links; a workdir and an output behind links."""
    expected, _ = whole("merge", vlmgraft)
    for folder in ("disk", "real", "work"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    places = []
    for key, source in (("vlm", "vlm"), ("donor", "donor"), ("donor_base", "base")):
        home = tmp_path / "cache" / f"models--lab--{source}"
        snapshot, blobs = home / "snapshots" / "0123abcd", home / "blobs"
        for folder in (snapshot, blobs):
            folder.mkdir(parents=True)
        for file in (trio / source).iterdir():
            shutil.copyfile(file, blobs / f"sha-{file.name}")
            (snapshot / file.name).symlink_to(Path("../../blobs") / f"sha-{file.name}")
        places += ["--set", f"{key}={snapshot}"]
    job = small_jobs["merge"](tmp_path / "link")
    ran = vlmgraft(*job.arguments, *places)
    assert ran.code == 0, ran.err
    weights = {name: one for name, one in content(tmp_path / "real" / "out").items() if name.endswith(".safetensors")}
    assert weights == {name: one for name, one in expected.items() if name.endswith(".safetensors")}
    assert not any(path.is_symlink() for path in (tmp_path / "real" / "out").iterdir())
    (tmp_path / "link" / "factors").symlink_to(tmp_path / "work", target_is_directory=True)
    made = small_jobs["decompose"](tmp_path / "link").arguments
    arguments = [str(tmp_path / "link" / "factors") if word == str(job.out) else word for word in made]
    assert vlmgraft(*arguments).code == 0
    assert (tmp_path / "work" / "factors.json").is_file() and (tmp_path / "link" / "factors").is_symlink()


OUT_OF_MEMORY = {
    "merge": ("vlmgraft.merging.engine.Merger.run", "--dry-run"),
    "decompose": ("vlmgraft.spectral.decompose.factorize", "method.rank"),
    "gates": ("vlmgraft.distillation.loading.Distiller", "method.calibration.batch_size"),
    "evaluate": ("vlmgraft.evaluation.evaluate._engine", "batch_size"),
    "sweep": ("vlmgraft.analysis.recipe_sweep.run_sweep", "batch_size"),
    "tune": ("vlmgraft.finetuning.tune.build_trainer", "per_device_train_batch_size"),
}


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_every_command_says_what_to_lower(
    name: str, small_jobs: Jobs, vlmgraft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: Any, **__: Any) -> None:
        torch.empty(1 << 60)  # torch's own error, of its own allocator

    place, remedy = OUT_OF_MEMORY[name]
    monkeypatch.setattr(place, greedy)
    job = small_jobs[name](tmp_path)
    ran = vlmgraft(*job.arguments)
    assert ran.code == 1, ran.err
    (said,) = [line for line in ran.err.splitlines() if line.startswith("vlmgraft: ")]
    assert "out of memory while" in said and remedy in said and "Traceback" not in ran.err
    assert unfinished(name, job.out)
