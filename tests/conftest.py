"""The embedded trio and a runner for the command line; shared by all tests."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from vlmgraft import cli
from vlmgraft.lab import trio_path

pytest_plugins = ["tests.tiny_models"]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: the models are tiny, threads only wait
settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")
STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--begin-within", type=float, default=float("inf"), help="seconds after which no test is begun")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """CI's time is limited: slow tests that it does not reach are counted as skipped, with this reason."""
    if time.monotonic() - STARTED > (limit := item.config.getoption("--begin-within")):
        pytest.skip(f"not begun within {limit:.0f} s")


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def trio() -> Path:
    """Folder of the embedded base, vlm and donor."""
    return trio_path()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """`zoo(case)`: the folders of a tiny VLM, donor and bases of a case of `families/zoo.py`, made when asked for."""
    from zoo import CASES, Trio, build

    made: dict[str, Trio] = {}

    def get(case: str) -> Trio:
        if case not in made:
            made[case] = build(CASES[case], tmp_path_factory.mktemp(case))
        return made[case]

    return get


@pytest.fixture(scope="session")
def image_calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 24 image questions of the lab's world, as users write it."""
    import numpy

    from vlmgraft.lab import world
    from vlmgraft.storage.jsonl import write_rows

    folder, rng = tmp_path_factory.mktemp("calibration"), numpy.random.default_rng(0)
    rows = []
    for number in range(24):
        item = world.draw_item(rng, world.PERCEPTION[number % 4])
        assert item.scene is not None
        world.render(rng, item.scene, "calibration").save(folder / f"{number}.png")
        rows.append({"question": item.question, "image": f"{number}.png"})
    write_rows(folder / "calibration.jsonl", rows)
    return folder / "calibration.jsonl"


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder as a merge leaves it, of empty files."""
    for name in ("config.json", "README.md", "model-1.safetensors", "model-2.safetensors", ".hidden"):
        (tmp_path / name).touch()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.fixture
def vlmgraft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs the command line in this process, through its entry point."""

    def run(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["vlmgraft", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return run


@pytest.fixture
def threads_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """torch's threads in every linear layer that runs, where nobody says how many and there are two cores."""
    import torch

    before, seen, forward = torch.get_num_threads(), list[int](), torch.nn.Linear.forward
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda layer, x: seen.append(torch.get_num_threads()) or forward(layer, x)
    )
    yield seen
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 2, "as many as before"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium by Playwright; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with playwright.sync_playwright() as driver:
        try:
            found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium here: {str(error).splitlines()[0]}")
        yield found
        found.close()
