"""Ctrl-C and SIGTERM: the way on, what is raised once, and what is as before afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from vlmgraft.cli import interrupts
from vlmgraft.cli.interrupts import Interrupted, how_to_go_on, interruptible


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("merge", "r.yaml", "--out", "my out"), "go on with: vlmgraft merge r.yaml --out 'my out' --resume"),
        (("merge", "r.yaml", "--out", "o", "--resume"), "go on with: vlmgraft merge r.yaml --out o --resume"),
        (("gates", "r.yaml", "--out", "g"), "what is done was kept; go on with: vlmgraft gates r.yaml --out g"),
        (("front", "r.yaml", "--out", "g"), "what is done was kept; go on with: vlmgraft front r.yaml --out g"),
        (("demo", "--out", "o"), "nothing was finished; start again with: vlmgraft demo --out o"),
        (("merge", "r.yaml", "--token", "hf_a", "--out", "o"), "go on with: vlmgraft merge r.yaml --out o --resume"),
        (("front", "r.yaml", "--token=hf_a"), "what is done was kept; go on with: vlmgraft front r.yaml"),
        (("export", "m", "--to", "hub"), "nothing was finished; start again with: vlmgraft export m --to hub"),
    ],
)
def test_the_way_on(words: tuple[str, ...], said: str) -> None:
    assert how_to_go_on(words) == said


def test_the_way_on_names_options_that_exist() -> None:
    """Every command that is said to have --resume has it, and no other."""
    from typer.main import get_command

    from vlmgraft.cli import app

    found = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        for full, one in [(f"{name} {key}", value) for key, value in inner.items()] if inner else [(name, command)]:
            if any("--resume" in parameter.opts for parameter in one.params):
                found.append(full)
    assert sorted(found) == sorted(interrupts.RESUMED)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell lets what it runs in the background ignore SIGINT, as the commands then do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_signal_is_raised_once_and_the_handlers_come_back(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = {one: signal.getsignal(one) for one in interrupts.SIGNALS}
    with pytest.raises(Interrupted), interruptible():
        assert {one: signal.getsignal(one) for one in before} != before
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert {one: signal.getsignal(one) for one in before} == before
    said = ""
    for _ in range(500):  # a thread of its own says it
        said += capfd.readouterr().err
        if "once more ends it at once" in said:
            break
        time.sleep(0.01)
    assert "stopping after the piece in hand; once more ends it at once" in said


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_in_another_thread_nothing_is_changed() -> None:
    """Only the main one may set handlers."""
    seen: list[Any] = []

    def work() -> None:
        with interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_it_is_no_exception_that_a_library_catches() -> None:
    assert not issubclass(Interrupted, Exception)


def test_a_token_is_never_printed() -> None:
    """HF_TOKEN gives it; its place may be the last word."""
    assert how_to_go_on(("evaluate", "m", "--token")) == "go on with: vlmgraft evaluate m --resume"
    assert how_to_go_on(("lab", "path")) == "nothing was finished; start again with: vlmgraft lab path"
