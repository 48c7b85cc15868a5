"""Question files: read line by line, checked, held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmgraft.data.questions import (
    Question,
    hold_images,
    load_questions,
    open_images,
    parse,
    questions_digest,
)
from vlmgraft.errors import DataError


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "q.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "p.png")
    return tmp_path / "p.png"


def test_a_line_becomes_a_question(tmp_path: Path, picture: Path) -> None:
    path = write(tmp_path, {"question": "Which?", "image": "p.png", "choices": ["red", 2], "answer": 3, "other": 1}, "")
    (question,) = load_questions(path)
    assert question == Question("Which?", (picture,), "3", ("red", "2"), None)
    assert question.prompt == "Which?\nA. red\nB. 2" and question.name == f"{path}, line 1"
    assert Question("x" * 99).name == f"question {'x' * 60!r}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be a JSON object"),
        ({"q": 1}, 'line 2: needs a "question"'),
        ({"question": " "}, 'line 2: needs a "question"'),
        ({"question": "a", "image": 5}, 'line 2: "image" must be a path'),
        ({"question": "a", "image": "gone.png"}, r"line 2: image .*gone\.png: missing"),
        ({"question": "a", "choices": list(range(27))}, 'line 2: "choices" must be a list of at most 26'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_questions(write(tmp_path, {"question": "good"}, row))


def test_a_file_without_questions_or_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such question file"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no question"):
        load_questions(write(tmp_path, ""))
    with pytest.raises(DataError, match="must show images"):
        load_questions(write(tmp_path, {"question": "a"}), need_images=True)


def test_a_limit_leaves_later_lines_unread(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "a"}, {"question": "b"}, "{")
    assert [question.question for question in load_questions(path, limit=2)] == ["a", "b"]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda each: st.lists(each, max_size=3)))
def test_parsing_is_json(value: Any) -> None:
    assert parse(json.dumps(value, ensure_ascii=False).encode()) == value == parse(json.dumps(value).encode())


def test_half_a_character_is_refused_or_replaced() -> None:
    with pytest.raises(ValueError):
        parse(b'"\\ud800"')
    assert parse(b'"\\ud800"', "replace") == "?"


def test_held_images_are_those_that_were_checked(picture: Path) -> None:
    question = Question("a", (picture, Image.new("RGB", (3, 3))), max_pixels=50)
    held, beyond = hold_images([question])[0], hold_images([question], budget=0)[0]
    assert held == beyond and held.pixels == 50 + 9 and question.pixels == 9
    assert questions_digest([held]) == questions_digest([question]) != questions_digest([Question("a", (picture,))])
    Image.new("RGB", (20, 10), "blue").save(picture)
    shown = open_images(held)[0]
    assert shown.width * shown.height <= 50 and shown.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(DataError, match=r"p\.png: changed while it was in use"):
        open_images(beyond)
