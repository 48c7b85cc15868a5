"""Registered sources: found by entry point, read like any other data; the library never imports the lab for them."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from vlmgraft.data import sources
from vlmgraft.data.sources import RegisteredSource, read_rows, registered_source
from vlmgraft.errors import DataError
from vlmgraft.evaluation.readers import load_suite


def draw(argument: str, split: str, count: int | None) -> list[sources.Row]:
    rows = [{"question": f"{split} {argument} {number} ?", "answer": str(number)} for number in range(count or 3)]
    return list(rows)


SOURCE = RegisteredSource(draw, ("test", "validation"), max_new_tokens=7)
NO_SOURCE = "a text"


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> object:
    def with_points(*targets: str) -> None:
        points = EntryPoints(EntryPoint("ours", target, sources.ENTRY_POINTS) for target in targets)
        monkeypatch.setattr(sources, "entry_points", lambda **given: points.select(**given))

    return with_points


def test_a_package_registers_its_own_source(register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    register(f"{__name__}:SOURCE")
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(SOURCE=SOURCE))
    rows, folder = read_rows("ours:x", split="validation", count=2)
    assert [row["question"] for row in rows] == ["validation x 0 ?", "validation x 1 ?"] and folder is None
    suite = load_suite("ours")
    assert [item.question for item in suite.items] == [f"test  {number} ?" for number in range(3)]
    assert suite.max_new_tokens == 7 and suite.items[2].answers == ("2",)
    with pytest.raises(DataError, match="test, validation"):
        read_rows("ours", split="train")
    monkeypatch.chdir(tmp_path)
    Path("ours").write_text("")
    assert registered_source("ours") is None, "a file of this name is the file"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("no.such.module:x",), "cannot be loaded"),
        (("json:dumps",), "no RegisteredSource but function"),
        (("json:dumps", "json:loads"), "json:dumps and json:loads"),
    ],
)
def test_a_bad_registration_is_refused(register, targets: tuple[str, ...], message: str) -> None:  # type: ignore[no-untyped-def]
    register(*targets)
    with pytest.raises(DataError, match=message):
        read_rows("ours")


def test_the_lab_is_registered() -> None:
    suite = load_suite("lab:1", split="validation", limit=16)
    assert [item.task for item in suite.items].count("sum") == 8 and len(suite.items) == 16
    assert {item.kind for item in suite.items} == {"reasoning", "perception"}
    assert suite.max_new_tokens == 28 and suite.digest != load_suite("lab:2", split="validation", limit=16).digest
    assert len(load_suite("lab").items) == 1000
    with pytest.raises(DataError, match="lab:SEED"):
        load_suite("lab:x")
