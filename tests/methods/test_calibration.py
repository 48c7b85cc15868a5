"""What a recipe may say of the prompts."""

from __future__ import annotations

from typing import Any

import pytest

from vlmgraft.errors import InputError
from vlmgraft.methods.calibration import Calibration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, r"calibration\.samples: 0 must be at least 1"),
        ({"batch_tokens": 0}, r"calibration\.batch_tokens: 0 must be at least 1"),
        ({"held_out": -1}, r"calibration\.held_out: -1 must not be negative"),
        ({"endpoint": "localhost:8000"}, r"calibration\.endpoint: a server's address must begin with http"),
        ({"endpoint": ""}, r"calibration\.endpoint: a server's address must begin with http"),
    ],
)
def test_what_cannot_be_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Calibration("q.jsonl", **options)


def test_no_prompts_may_be_held_out_and_a_server_may_answer() -> None:
    found = Calibration("q.jsonl", samples=1, held_out=0, endpoint="http://127.0.0.1:8000/v1")
    assert (found.samples, found.held_out, found.columns) == (1, 0, {})
