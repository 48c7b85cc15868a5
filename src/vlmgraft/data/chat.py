"""Chats as turns in parts of text and image: `conversations` as in LLaVA, `messages` as in OpenAI, TRL and ms-swift."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import dropwhile
from typing import Any

from vlmgraft.errors import DataError

MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
FOREIGN_MARKS = ("<video>", "<audio>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant turn's reasoning: DeepSeek's and vLLM's, vLLM's since 0.12, gpt-oss'."""
THINK_MARKS = ("<think>", "</think>")
WEIGHTS = ("weight", "loss", "loss_scale", "train")
"""Keys of a turn's weight in the loss: OpenAI's, ms-swift's, axolotl's."""
UNREAD_KEYS = ("tool_calls", "function_call", "images", "image", "videos", "video", "audios", "audio")
"""Unsupported keys of a turn that would change what is learned."""


def parts_of(text: str) -> list[dict[str, str]]:
    """Split a text at its marks into parts of type "image" and "text". The line break after an image and white space
    before the first text are removed; blank parts are left out."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(MARK)):
        if number:
            parts.append({"type": "image"})
            whole, piece = piece, re.sub(r"^[ \t]*\r?\n", "", piece)
            piece = piece.lstrip() if piece == whole and not any("text" in part for part in parts) else piece
        parts += [{"type": "text", "text": piece}] if piece.strip() else []
    return parts


def first_user_turn(row: Mapping[str, Any], images: list[Any], where: str) -> tuple[str, list[Any]]:
    """(text, images) of a chat's first user turn. The images are those in its parts, or as many of the row's `images`
    as the turn has marks, or all if the chat has no marks. Raises DataError if there is no user turn."""
    shown = [turn for turn in _raw_turns(row, where) if ROLES.get(_role(turn)) != "assistant"]
    turns = [turn["content"] for turn in chat_turns({"messages": shown}, where) if turn["role"] == "user"]
    if not turns:
        raise bad_row(where, "has no user turn")
    pieces = [MARK if part["type"] == "image" else part["text"] for part in turns[0]]
    behind = list(dropwhile(MARK.__eq__, pieces))  # leading images need no marks
    text = "".join(pieces) if MARK in behind else "\n".join(map(str.strip, behind))
    held = [part["image"] for part in turns[0] if part.get("image") is not None]
    places = [sum(part["type"] == "image" for part in turn) for turn in turns]
    return text, held or (images[: places[0]] if any(places) else images)


def chat_turns(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The turns of a row's chat as role and parts, the column `system` first; an assistant's reasoning stands in front
    of its text. Raises DataError for anything in a turn that would be dropped but changes what is learned."""
    turns = []
    raw = _raw_turns(row, where)
    for number, turn in enumerate(raw, start=1):
        role = ROLES.get(_role(turn))
        if role is None:
            raise bad_row(where, f"role {_role(turn)!r:.60} is none of {', '.join(ROLES)}")
        if unread := next((key for key in UNREAD_KEYS if turn.get(key)), None):
            raise bad_row(where, f'turn {number} has "{unread}", which is not read; only text and images are')
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        if content is None:
            raise bad_row(where, f"turn {number}, of the {role}, has no content")
        if role == "assistant":
            last = turn is raw[-1]
            if weight := next((key for key in WEIGHTS if last and turn.get(key) not in (None, "", 1)), None):
                raise bad_row(where, f'its last turn has "{weight}": {turn[weight]!r:.40}, but all answers weigh 1')
            turns.append({"role": role, "content": _answer(turn, content, where)})
        else:
            turns.append({"role": role, "content": turn_parts(content, where)})
    return checked_turns(row, turns, where)


def _raw_turns(row: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    chat = row.get("messages") or row.get("conversations") or []
    if not isinstance(chat, list) or not all(isinstance(turn, Mapping) for turn in chat):
        raise bad_row(where, f"its chat must be a list of turns, got {chat!r:.80}")
    return chat


def _role(turn: Mapping[str, Any]) -> str:
    return str(turn.get("role", turn.get("from")))


def _answer(turn: Mapping[str, Any], content: Any, where: str) -> list[dict[str, Any]]:
    """The parts of an assistant's turn; its text may mention <image>."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else turn_parts(content, where)
    thoughts = list(dict.fromkeys(str(turn[key]) for key in THOUGHTS if turn.get(key)))
    if len(thoughts) > 1:
        raise bad_row(where, f"a turn has several texts of reasoning; leave one of {', '.join(THOUGHTS)}")
    if not thoughts or not thoughts[0].strip():
        return parts
    if any(part["type"] != "text" for part in parts):
        raise bad_row(where, "a turn of the assistant has reasoning and an image")
    text = with_reasoning(thoughts[0], "".join(part["text"] for part in parts), where)
    return [{"type": "text", "text": text}]


def with_reasoning(thought: str, answer: str, where: str) -> str:
    """The reasoning, without marks of its own, between <think> marks, and the answer; an answer alone is unchanged."""
    thought = thought.strip()
    if not thought:
        return answer
    if thought.startswith(THINK_MARKS[0]) and thought.endswith(THINK_MARKS[1]):
        thought = thought[len(THINK_MARKS[0]) : -len(THINK_MARKS[1])]
    if any(mark in text for mark in THINK_MARKS for text in (thought, answer)):
        raise bad_row(where, "has think marks inside its reasoning, or in its answer beside it; remove them")
    if not answer.strip():
        raise bad_row(where, "has reasoning, but no answer")
    return f"<think>{_padded(thought)}</think>{_padded(answer).rstrip()}"


def checked_turns(row: Mapping[str, Any], turns: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The turns after the one in the column `system`, if there is one; raises DataError if a text holds special tokens
    of images or video, which processors would expand."""
    system = row.get("system")
    if system and (not isinstance(system, str) or (turns and turns[0]["role"] == "system")):
        raise bad_row(where, 'column "system" must be a text, and the only system turn')
    if system:
        turns = [{"role": "system", "content": [{"type": "text", "text": system}]}, *turns]
    for turn in turns:
        for part in turn["content"]:
            if mark := next((mark for mark in FOREIGN_MARKS if mark in part.get("text", "")), None):
                role = turn["role"]
                raise bad_row(where, f"a turn of the {role} has {mark} in its text; write <image> for a picture")
    return turns


def _padded(text: str) -> str:
    """The text between line breaks if it has several lines, else between spaces."""
    gap = "\n" if "\n" in text.strip() else " "
    return f"{gap}{text.strip()}{gap}"


def turn_parts(content: Any, where: str) -> list[dict[str, Any]]:
    """A turn's content in parts of text and image."""
    if isinstance(content, str):
        return parts_of(content)
    kept = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise bad_row(where, f"a part of a turn is neither text nor image: {part!r:.80}")
        if kind == "text":
            kept.append({"type": "text", "text": part["text"]})
        else:
            kept.append({"type": "image"} | ({"image": part["image"]} if part.get("image") is not None else {}))
    return kept


def bad_row(where: str, what: str) -> DataError:
    """What is wrong with a row, and the remedy."""
    return DataError(f"{where}: {what}; mend the row, or drop it")
