"""Traces in their three forms, and what is refused before training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmgraft.data.images import open_picture
from vlmgraft.data.questions import load_questions
from vlmgraft.data.traces import Traces, load_traces
from vlmgraft.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        Image.new("RGB", (16, 16), (200, 10, 10)).save(tmp_path / f"{name}.png")
    return tmp_path


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "traces.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(folder: Path, *rows: Any, **options: Any) -> Traces:
    return load_traces(written(folder, *rows), **options)


PARTS = [{"type": "image"}, {"type": "text", "text": "what ?"}]


def test_the_three_forms_are_one(folder: Path) -> None:
    said = "<think> look </think> red"
    traces = read(
        folder,
        {"image": "a.png", "question": "what ?", "answer": said},
        {"image": ["a.png"], "question": "what ?", "reasoning": "look", "answer": "red"},
        {"image": "a.png", "question": "what ?", "reasoning": "<think>look</think>", "answer": "red"},
        {
            "images": ["a.png"],
            "messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": said}],
        },
        {"images": ["a.png"], "messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": said}]},
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>what ?"}, {"from": "gpt", "value": said}],
        },
    ).traces
    assert len(traces) == 6 and len({trace.answer for trace in traces}) == 1
    assert all(trace.prompt == ({"role": "user", "content": PARTS},) for trace in traces)
    assert all(trace.images == (folder / "a.png",) for trace in traces)


def test_earlier_turns_are_context_and_marks_place_images(folder: Path) -> None:
    turns = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "first <image> then <image> ?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "sure ?"},
        {"role": "assistant", "content": "yes"},
    ]
    (trace,) = read(folder, {"images": ["a.png", "b.png"], "messages": turns}).traces
    assert [turn["role"] for turn in trace.prompt] == ["system", "user", "assistant", "user"]
    assert [part["type"] for part in trace.prompt[1]["content"]] == ["text", "image", "text", "image", "text"]
    assert trace.answer == "yes"


def test_a_text_row_needs_no_image_and_long_thoughts_stand_on_lines(folder: Path) -> None:
    (trace,) = read(folder, {"question": "1 + 1 ?", "reasoning": "one\ntwo", "answer": "2"}).traces
    assert trace.images == () and trace.answer == "<think>\none\ntwo\n</think> 2"


def test_columns_and_limit(folder: Path) -> None:
    rows = [{"problem": f"q{n}", "solution": str(n)} for n in range(5)]
    traces = read(folder, *rows, columns={"question": "problem", "answer": "solution"}, limit=2).traces
    assert [trace.answer for trace in traces] == ["0", "1"]
    with pytest.raises(DataError, match=r"unknown column 'reasonning'; it is one of question, .*reasoning"):
        read(folder, *rows, columns={"question": "problem", "answer": "solution", "reasonning": "problem"})


def test_the_dataset_decodes_pictures(folder: Path) -> None:
    Image.new("L", (8, 8)).save(folder / "grey.png")
    data = read(folder, {"image": "grey.png", "question": "what ?", "answer": "grey"}).dataset()
    row = data[0]
    assert row["images"][0].mode == "RGB" and row["images"][0].size == (8, 8)
    assert row["completion"] == [{"role": "assistant", "content": [{"type": "text", "text": "grey"}]}]


def test_parquet_with_a_column_of_images(folder: Path) -> None:
    from datasets import Dataset, Features, Image as ImageFeature, Value

    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    rows = [{"image": str(folder / "a.png"), "question": "what ?", "answer": "red"}]
    Dataset.from_list(rows, features=features).to_parquet(folder / "t.parquet")
    traces = load_traces(folder / "t.parquet")
    assert traces.dataset()[0]["images"][0].getpixel((0, 0)) == (200, 10, 10)


def test_choices_are_learned_as_they_are_evaluated(folder: Path) -> None:
    question = {"question": "which ?"}
    (folder / "q.jsonl").write_text(json.dumps({**question, "choices": {"B": "blue", "A": "red"}}))
    (shown,) = load_questions(folder / "q.jsonl")
    first, second, third = read(
        folder,
        {**question, "choices": {"B": "blue", "A": "red"}, "answer": "A"},
        {**question, "options": ["red", "blue"], "answer": 0},
        {"instruction": "which ?", "choices": ["A. red", "B. blue"], "output": "A. red", "reasoning": "warm"},
    ).traces
    user_turn = {"role": "user", "content": [{"type": "text", "text": shown.prompt}]}
    assert shown.prompt == "which ?\nA. red\nB. blue"
    assert all(trace.prompt == (user_turn,) for trace in (first, second, third))
    assert (first.answer, second.answer, third.answer) == ("A", "A", "<think> warm </think> A. red")
    with pytest.raises(DataError, match=r"the answers number the choices from 1"):
        read(folder, *({**question, "choices": ["red", "blue", "x"], "answer": answer} for answer in (1, 3)))


def test_numbers_are_learned_as_they_are_scored(folder: Path) -> None:
    (trace,) = read(folder, {"question": "1 + 1 ?", "answer": 2.0}).traces
    assert trace.answer == "2"


def test_16_bits_are_seen_as_in_evaluation(folder: Path) -> None:
    """A ramp over all 16-bit values has the mean 127.5 in 8 bits; clipped, nearly all of it is white."""
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(ramp).save(folder / "ramp.png")
    rows = [{"question": "q", "answer": "a", "image": name} for name in ("ramp.png", "a.png")]
    traces = read(folder, *rows)
    path = folder / "ramp.png"
    within = Traces((replace(traces.traces[0], images=(path.read_bytes(), Image.open(path))),), "")
    for image in (*traces.dataset()[0]["images"], *within.dataset()[0]["images"]):
        seen = np.asarray(image).astype(float)
        assert seen.shape == (16, 16, 3) and abs(seen.mean() - 127.5) < 1
        assert np.array_equal(seen, np.asarray(open_picture(path, "ramp")))
    assert traces.dataset()[1]["images"][0].getpixel((0, 0)) == (200, 10, 10)


USER = {"role": "user", "content": "what ?"}
YES = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [USER]}, "no assistant turn"),
        ({"question": "what ?"}, "no assistant turn"),
        ({"messages": [YES]}, "begins with the assistant"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "last assistant turn is empty"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, "role 'robot'"),
        ({"messages": [USER, YES], "images": ["c.png"]}, r"image .*c\.png: missing"),
        ({"messages": [{"role": "user", "content": "<image>?"}, YES]}, "1 places for images, but 0 images"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, YES]}, "neither text nor image"),
        ({"messages": [{"role": "system", "content": "x"}, YES], "images": ["a.png"]}, "no user turn"),
        ({"messages": "hello"}, "must be a list of turns"),
        ({"images": [3], "question": "q", "answer": "a"}, "must be a path or a picture"),
        ({"image": "traces.jsonl", "question": "q", "answer": "a"}, "cannot be read, or is corrupt"),
        ({"question": "q", "answer": float("nan")}, "a question without an answer"),
        ({"question": "q", "answer": float("inf")}, '"answer" and "reasoning" must be texts'),
        ({"question": "q", "answer": "a", "history": [["x", None]]}, 'column "history" must be pairs of texts'),
        ({"question": "q", "answer": "4", "reasoning": "a </think> b"}, "think marks inside"),
        ({"question": "q", "answer": "B", "options": "red, blue"}, '"options": .* is neither a list'),
        ({"question": "q", "answer": 5, "options": ["red", "blue"]}, "answer '5' is none of the 2 choices"),
        (
            {"messages": [USER, {"role": "assistant", "content": PARTS}], "images": ["a.png"]},
            "has an image, which cannot",
        ),
        ({"image": "https://x.org/r.png", "question": "q", "answer": "a"}, "not read from URLs: https://x.org"),
        ({"text": "hello"}, 'needs "question" and "answer"'),
        ("{not json", "line 2: not JSON"),
        ("[1]", "must be a JSON object"),
    ],
)
def test_bad_rows_are_named(folder: Path, row: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read(folder, {"question": "q", "answer": "a"}, row)
    assert "traces.jsonl" in str(caught.value) and " 2" in str(caught.value)


def test_a_list_in_one_file(folder: Path) -> None:
    (folder / "all.json").write_text(json.dumps([{"question": "q", "answer": "a"}] * 2))
    assert len(load_traces(folder / "all.json").traces) == 2
    (folder / "all.json").write_text("[1,")
    with pytest.raises(DataError, match="not JSON"):
        load_traces(folder / "all.json")


def test_no_file_and_no_rows(folder: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_traces(folder / "none.jsonl")
    with pytest.raises(DataError, match="no row"):
        read(folder)


def test_other_trainers_layouts_are_taken_as_they_take_them(folder: Path) -> None:
    """alpaca joins instruction and input by a new line (LLaMA-Factory), history comes first, a column `system` before
    all; TRL's parts hold their picture; ms-swift's older rows have query and response."""
    alpaca = {"instruction": "name it", "input": "<image>quickly", "output": "red", "system": "be short"}
    alpaca |= {"images": ["a.png"], "history": [["hello", "hi"]]}
    held = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "what ?"}]
    trl = {"messages": [{"role": "user", "content": held}, {"role": "assistant", "content": "red"}]}
    swift = {"query": "<image>what ?", "response": "red", "images": ["a.png"]}
    sharegpt = {"conversations": [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}], "system": "s"}
    first, second, third, fourth = read(folder, alpaca, trl, swift, sharegpt).traces
    assert [(turn["role"], turn["content"]) for turn in first.prompt] == [
        ("system", [{"type": "text", "text": "be short"}]),
        ("user", [{"type": "text", "text": "hello"}]),
        ("assistant", [{"type": "text", "text": "hi"}]),
        ("user", [{"type": "text", "text": "name it\n"}, {"type": "image"}, {"type": "text", "text": "quickly"}]),
    ]
    assert second.prompt == third.prompt == ({"role": "user", "content": PARTS},)
    assert (second.images, third.images) == ((folder / "b.png",), (folder / "a.png",))
    assert [turn["role"] for turn in fourth.prompt] == ["system", "user"] and fourth.answer == "red"
    assert {trace.answer for trace in (first, second, third)} == {"red"}


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"question": "q", "answer": "a", "videos": ["a.mp4"]}, ['column "videos"', "row 2"]),
        ({"question": "<video>q", "answer": "a"}, ["<video>", "row 2"]),
        ({"question": "<|vision_start|><|image_pad|><|vision_end|>q", "answer": "a"}, ["<|vision_start|>", "<image>"]),
        ({"question": "q", "answer": "a", "tools": [{"name": "f"}]}, ['column "tools"']),
        ({"question": "q", "answer": "a", "history": ["x"]}, ['column "history"', "pairs"]),
        (
            {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"},
                          {"role": "assistant", "content": "c"}], "system": "d"},
            ['column "system"'],
        ),
        (
            {"images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "image", "image": "b.png"}]},
                                               {"role": "assistant", "content": "c"}]},
            ["in the parts of its turns and in a column"],
        ),
    ],
)  # fmt: skip
def test_what_would_be_learned_as_something_else_is_refused(folder: Path, row: Any, parts: list[str]) -> None:
    with pytest.raises(DataError) as refused:
        read(folder, {"question": "q", "answer": "a"}, row)
    assert [part for part in parts if part not in str(refused.value)] == []
