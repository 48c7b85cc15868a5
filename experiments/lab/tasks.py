"""Tasks of the lab beside those of its exam: what the trio was trained on, and what its merges were never made for."""

from __future__ import annotations

from typing import get_args

import numpy as np

from vlmgraft.lab import world
from vlmgraft.lab.world import ExamItem, Scene, Split

TEXT_ONLY = ("copy", "fact")
TRANSFER = ("small_digits", "large_digits", "reworded", "five_digits", "difference")
"""Beside the sum: sums of digits up to 4, of digits from 5, in other words, of five digits, and differences."""
TRANSFER_TEXT = ("numbers",)
"""Sums of numbers from 5 to 15, which no glyph shows."""
LARGEST_NUMBER = 63
FACT = "what is {} + {} ?"
PHRASES = {  # of the vocabulary's words alone: it must stay as it is
    "reworded": "what is the sum of all glyphs ?",
    "difference": "what is the first cell - the second cell ?",
}
NUMBERS = tuple(str(number) for number in range(LARGEST_NUMBER + 1))


def vocabulary() -> list[str]:
    """Every word of the world, special tokens first; the position in the list is the token id."""
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>", "<think>", "</think>"]
    phrases = " ".join([*world.PHRASES.values(), "copy", FACT]).replace("{}", "").split()
    words = ["user", "assistant", "system", *world.COLOURS, *world.SHAPES, *world.POSITIONS, *phrases, "=", ";", "-"]
    return list(dict.fromkeys([*special, *NUMBERS, *words]))


def draw_item(rng: np.random.Generator, task: str) -> ExamItem:
    """One random question of any kind: of the exam's, of `TEXT_ONLY`, or one that the trio was not tuned on."""
    if task == "fact":
        first, second = int(rng.integers(0, 46)), int(rng.integers(0, 10))
        return ExamItem(task, FACT.format(first, second), str(first + second), None)
    if task == "copy":
        words = rng.choice([*world.COLOURS, *world.SHAPES, *NUMBERS], rng.integers(2, 7))
        return ExamItem(task, f"copy {' '.join(words)}", " ".join(words), None)
    if task in world.PHRASES:
        return world.draw_item(rng, task)
    scene = world.draw_scene(rng, only_digits=True, cells=5 if task == "five_digits" else world.CELLS)
    glyphs = list(scene.glyphs)
    low, high = {"small_digits": (0, 5), "large_digits": (5, 10), "numbers": (5, 16)}.get(task, (0, 0))
    if high:
        glyphs = rng.integers(low, high, world.CELLS).astype(str).tolist()
    answer = world.chain_of_thought(glyphs)
    if task == "difference":
        glyphs[:2] = sorted(glyphs[:2], reverse=True)
        difference = int(glyphs[0]) - int(glyphs[1])
        answer = f"<think> {glyphs[0]} - {glyphs[1]} = {difference} </think> {difference}"
    return ExamItem(task, PHRASES.get(task, world.PHRASES["sum"]), answer, Scene(scene.colours, tuple(glyphs)))


def draw_items(seed: int, split: Split, tasks: tuple[str, ...], count: int) -> list[ExamItem]:
    """`count` questions of each kind, shuffled; splits and seeds never share a random stream."""
    rng = np.random.default_rng([seed, get_args(Split).index(split), 20])
    items = [draw_item(rng, task) for task in tasks for _ in range(count)]
    return [items[index] for index in rng.permutation(len(items))]
