"""What commands show: tables, sizes, percentages, progress and the log."""

from __future__ import annotations

import io
from typing import Any

import pytest

from vlmgraft.cli.output import LineProgress, cell, log_to_terminal, percent, progress_bar, show_table, size
from vlmgraft.storage.progress import LOG


def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from vlmgraft.cli.output import LineProgress

    with LineProgress(every=0.01) as lines:
        lines(0, 40, "q_proj")
        lines(10, 40, "q_proj")
        while "10 of 40" not in (said := capsys.readouterr().err):
            pass
    assert "q_proj: 10 of 40 (25 %), " in said and " left\n" in said


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.123456, "0.1235"),
        (1234567.0, "1.235e+06"),
        (7, "7"),
        ("x", "x"),
        ({"mean": 0.727, "low": 0.6914, "high": 0.7625}, "72.7 [69.1, 76.2]"),
    ],
)
def test_cells(value: Any, text: str) -> None:
    assert cell(value) == text


def test_no_estimate_is_no_text() -> None:
    assert percent(None) == "" and percent({"mean": 1.0, "low": 0.0, "high": 1.0}) == "100.0 [0.0, 100.0]"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, ""), (1, "1 B"), (999, "999 B"), (1000, "1.0 kB"), (16.6e9, "16.6 GB"), (2_500_000, "2.5 MB")],
)
def test_sizes(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def test_a_table_has_its_title_and_aligns_numbers_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("a title", ("name", "value"), [("short", 1.0), ("longer", 123.4), ("none", None)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "a title"
    short, longer = (next(line for line in lines if word in line) for word in ("short", "longer"))
    assert short.index("short") == longer.index("longer"), "names begin in one column"
    assert short.rindex("1") == longer.rindex("123.4") + 4, "numbers end in one column"


def test_a_long_cell_is_folded_and_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("t", ("name", "value"), [("x" * 300, 1)])
    assert capsys.readouterr().out.count("x") == 300


@pytest.mark.parametrize(
    ("verbose", "quiet", "shown"),
    [
        (0, False, ["warning", "error"]),
        (1, False, ["info", "warning", "error"]),
        (2, False, ["debug", "info", "warning", "error"]),
        (9, False, ["debug", "info", "warning", "error"]),
        (2, True, ["error"]),
    ],
)
def test_the_log_says_more_when_it_is_asked_to(
    verbose: int, quiet: bool, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    level, handlers = LOG.level, list(LOG.handlers)
    try:
        for _ in range(2):  # a second command of a process adds no second line
            log_to_terminal(verbose, quiet)
        for name in ("debug", "info", "warning", "error"):
            getattr(LOG, name)("about %s", name)
        said = capsys.readouterr()
    finally:
        LOG.setLevel(level)
        LOG.handlers[:] = handlers
    assert said.out == "" and said.err.splitlines() == [f"{name}: about {name}" for name in shown]


def test_progress_is_of_the_first_process_and_not_of_a_quiet_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with progress_bar(quiet=True) as nothing:
        assert nothing is None
    with progress_bar(quiet=False) as lines:
        assert isinstance(lines, LineProgress)
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    with progress_bar(quiet=False) as nothing:
        assert nothing is None


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    monkeypatch.setattr(drawn, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", drawn)
    with progress_bar(quiet=False) as progress:
        assert progress is not None and not isinstance(progress, LineProgress)
        progress(10, 40, "q_proj")
    assert "q_proj" in drawn.getvalue() and "10/40" in drawn.getvalue()
