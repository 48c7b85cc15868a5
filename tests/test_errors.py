"""Errors are one printable line, and their classes are the exit codes."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from vlmgraft import errors
from vlmgraft.errors import LONGEST, DamagedError, InputError, NumericalError, VlmgraftError, WeightsError, printable


@given(st.text(max_size=3 * LONGEST))
def test_whatever_is_quoted_is_one_line_that_a_terminal_shows(text: str) -> None:
    said = printable(text)
    assert said.isprintable()
    if text.isprintable() and text == text.strip() and len(text) <= LONGEST:
        assert said == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  a \t\r\n\n  b\n", "a b"),
        ("\x1b[2J", "\\x1b[2J"),
        ("tab\there", "tab\\there"),
        ("\u202eevil", "\\u202eevil"),
        ("‖τ‖ é", "‖τ‖ é"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text: str, said: str) -> None:
    assert printable(text) == said == str(VlmgraftError(text))


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    """The file is named first, the remedy last."""
    assert printable("x" * LONGEST) == "x" * LONGEST
    said = printable("file: " + "x" * LONGEST + "; take another")
    assert said.startswith("file: x") and said.endswith("x; take another") and " … " in said
    assert 0.8 * LONGEST < len(said) <= LONGEST


def test_what_was_wrong_before_the_start_exits_with_2() -> None:
    """All others with 1; weights are an input, though met in the work."""
    found = {one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, VlmgraftError)}
    assert {one.__name__ for one in found if one.exit_code == 1} == {"VlmgraftError", "NumericalError"}
    assert {one for one in found if issubclass(one, InputError)} == found - {VlmgraftError, NumericalError}
    assert WeightsError.exit_code == 2 and issubclass(WeightsError, NumericalError)


def test_a_damaged_file_is_named_with_what_is_wrong_and_the_remedy() -> None:
    error = DamagedError("work/gates.json", "no\nnumber" + "x" * 1_000)
    assert str(error).startswith("work/gates.json: is not what vlmgraft wrote (no numberxxx")
    assert str(error).endswith("; take a whole copy, or make it again") and len(str(error)) < 400
    assert isinstance(error, ValueError) and error.exit_code == 2
