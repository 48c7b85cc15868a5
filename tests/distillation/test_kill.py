"""kill -9 at random moments of decomposition, teacher, training and merge: one unit of work is lost, nothing else.

Children are forked, run the whole merge on the embedded trio and are killed from outside after a random (seeded) time.
A unit is a matrix, a batch of the teacher's, or the ten steps between two states of the training.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import vlmgraft as vg

sys.path.insert(0, str(Path(__file__).parent))
from kill_child import merge_and_note

STEPS, KEPT_EVERY = 40, 10
Stamp = tuple[int, int]


@pytest.fixture(scope="module")
def recipe(trio: Path, image_calibration: Path) -> dict[str, Any]:
    calibration = {"data": str(image_calibration), "samples": 16, "held_out": 4, "max_new_tokens": 4, "batch_size": 4}
    places = {"vlm": str(trio / "vlm"), "donor": str(trio / "donor"), "donor_base": str(trio / "base")}
    method = {"name": "frism", "steps": STEPS, "learning_rate": 0.2, "inject_weight": 0.1, "calibration": calibration}
    return {**places, "method": method, "layers": "0-1"}


@pytest.fixture(scope="module")
def whole(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A merge that nobody interrupts, and how long it took."""
    folder, began = tmp_path_factory.mktemp("whole"), time.monotonic()
    vg.merge(recipe, folder / "merged", workdir=folder / "work")
    return folder, time.monotonic() - began


CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["vlmgraft.distillation.learn", "vlmgraft.pipeline", "vlmgraft.merging"])
"""Children come from a server that has imported and done nothing else: what other tests left plays no part."""


def units(folder: Path) -> dict[str, Stamp]:
    """Finished units: matrices and the teacher's batches, with inode and time of writing."""
    found = [*folder.glob("work/factors/*.safetensors"), *folder.glob("work/gates.teacher/*/*.safetensors")]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def steps(folder: Path, since: int) -> list[int]:
    """Training steps in the log, from byte `since` on."""
    text = (folder / "log").read_bytes()[since:].decode() if (folder / "log").exists() else ""
    return [int(line.split()[1]) for line in text.splitlines() if line.startswith("gates ")]


def content(folder: Path) -> dict[str, Any]:
    """Every file's content; of tensor files the tensors' bytes and the header, whose keys have no fixed order."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                header = sorted((file.metadata() or {}).items())
            raw = {key: (str(one.dtype), one.view(torch.uint8).numpy().tobytes()) for key, one in tensors.items()}
            found[name] = (raw, header)
        elif path.is_file() and path.name != "receipt.json":  # has the time it took
            found[name] = path.read_bytes()
    return found


def killed_and_resumed(recipe: dict[str, Any], folder: Path, seed: int, kills: int, seconds: float) -> int:
    """Kill `kills` children, then let one finish; checks after each what was kept. Returns how many were killed."""
    rng, reached = random.Random(seed), 0
    for turn in range(kills + 1):
        before = units(folder)
        size = (folder / "log").stat().st_size if (folder / "log").exists() else 0
        child = CLEAN.Process(target=merge_and_note, args=(recipe, folder))
        child.start()
        if turn < kills:
            child.join(rng.uniform(0.1, seconds / 2))
            child.kill()
        child.join()
        after, walked = units(folder), steps(folder, size)
        assert {name: after[name] for name in before} == before, "a finished unit is never made again"
        if walked:
            assert walked[0] > reached - KEPT_EVERY, "at most the steps since the last state are repeated"
            reached = max(reached, walked[-1])
        if child.exitcode != -signal.SIGKILL:
            assert child.exitcode == 0
            return turn
    raise AssertionError("the last child did not finish")


def check(recipe: dict[str, Any], whole: tuple[Path, float], folder: Path, seed: int, kills: int) -> int:
    hit = killed_and_resumed(recipe, folder, seed, kills, whole[1])
    for part in ("work", "merged"):
        expected, found = content(whole[0] / part), content(folder / part)
        assert found.keys() == expected.keys(), "no stray file stays"
        assert [name for name in expected if found[name] != expected[name]] == []
    assert {path.name for path in folder.iterdir()} == {"merged", "work", "log"}
    return hit


@pytest.mark.slow
def test_two_kills(recipe: dict[str, Any], whole: tuple[Path, float], tmp_path: Path) -> None:
    check(recipe, whole, tmp_path, seed=0, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_kills(recipe: dict[str, Any], whole: tuple[Path, float], tmp_path: Path, seed: int) -> None:
    assert check(recipe, whole, tmp_path, seed, kills=6) >= 1, "a child was killed before it was done"
