"""Chats: turns of all trainers' forms in parts, and what in a turn would be dropped without a word."""

from __future__ import annotations

from typing import Any

import pytest

from vlmgraft.data.chat import chat_turns, first_user_turn, parts_of
from vlmgraft.errors import DataError

ASK = {"role": "user", "content": "2 + 2 ?"}


def answered(**keys: Any) -> str:
    turns = chat_turns({"messages": [ASK, {"role": "assistant", **keys}]}, "row 1")
    (part,) = turns[-1]["content"]
    return str(part["text"])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_an_answer_stands_in_front_of_it(key: str) -> None:
    """DeepSeek's, vLLM's and gpt-oss' forms are the one that their templates write."""
    for thought in ("2+2", " <think>2+2</think>\n"):
        assert answered(content="4", **{key: thought}) == "<think> 2+2 </think> 4"
        assert answered(content=[{"type": "text", "text": "4"}], **{key: thought}) == "<think> 2+2 </think> 4"
    assert answered(content="4", **{key: None}) == answered(content="4", **{key: " "}) == "4"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"content": "4", "tool_calls": [{"name": "f"}]}, 'turn 2 has "tool_calls"'),
        ({"content": None, "function_call": {"name": "f"}}, 'turn 2 has "function_call"'),
        ({"content": "4", "weight": 0}, 'its last turn has "weight": 0'),
        ({"content": "4", "loss": False}, 'its last turn has "loss": False'),
        ({"content": None}, "turn 2, of the assistant, has no content"),
        ({"content": "4", "reasoning_content": "a </think> b"}, "think marks inside"),
        ({"content": "<think>x</think>4", "reasoning_content": "x"}, "think marks inside"),
        ({"content": "4", "reasoning_content": "<think>a</think> b </think>"}, "think marks inside"),
        ({"content": " ", "reasoning_content": "2+2"}, "reasoning, but no answer"),
        ({"content": "4", "reasoning_content": "a", "thinking": "b"}, "several texts of reasoning"),
    ],
)
def test_what_would_be_learned_otherwise_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"row 1: .*{message}"):
        answered(**keys)


def test_harmless_keys_and_weights_are_read() -> None:
    assert answered(content="4", weight=1, loss=True, tool_calls=[], name="x", language="en") == "4"
    earlier = {"role": "assistant", "content": "4", "weight": 0}  # context only, which it is anyway
    turns = chat_turns({"messages": [ASK, earlier, ASK, {"role": "assistant", "content": "5"}]}, "row 1")
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2


def test_turns_of_a_user_are_not_dropped() -> None:
    with pytest.raises(DataError, match='turn 1 has "images"'):
        chat_turns({"messages": [{**ASK, "images": ["a.png"]}]}, "row 1")
    with pytest.raises(DataError, match="turn 1, of the user, has no content"):
        chat_turns({"conversations": [{"from": "human", "value": None}]}, "row 1")


def test_a_question_is_read_whatever_was_answered() -> None:
    """Data sets of prompts have no answers, or calls of tools."""
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert first_user_turn({"messages": [ASK, calls]}, [], "row 1") == ("2 + 2 ?", [])


def test_text_is_split_at_its_marks() -> None:
    assert parts_of("<image>\nwhat <image>?") == [
        {"type": "image"},
        {"type": "text", "text": "what "},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
